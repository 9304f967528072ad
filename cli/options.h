// options.h - the options of a command line, over CLI11.
//
// CLI11 costs a compiler more than ten seconds in every file that includes it. Here options.cc
// alone does; a sub-command sees three small classes. Each is a view of what Parser owns: copy
// freely, and do not outlive the Parser.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace sluice::cli {

/// What is said of one option after it was added. Each call returns the same option.
class Option {
 public:
  explicit Option(CLI::Option* option) : option_(option) {}

  Option required();
  Option range(int low, int high);  ///< Both ends included.
  Option range(double low, double high);
  Option non_negative();  ///< For a value of type int.
  Option positive();      ///< For a value of type float: above 0, finite, not subnormal.
  Option not_empty();
  Option one_of(const std::vector<std::string>& values);
  Option one_of(std::initializer_list<int> values);
  Option existing_file();                   ///< It is read, so no output may take its place,
  Option gives_way_to(const char* output);  ///< except this one, which is what it is for.
  Option existing_directory();
  Option writable_file();    ///< Not written yet, so that a mistyped path costs no finished run.
  Option comma_separated();  ///< For lists: "1,16,64" as well as several words.
  Option type_name(const char* name);  ///< What the help shows as the value, e.g. FILE.
  Option shows_default();              ///< The help tells the value that stands there now.

 private:
  CLI::Option* option_;
};

/// The program, or one sub-command of it.
class Command {
 public:
  explicit Command(CLI::App* app) : app_(app) {}

  [[nodiscard]] Command add_subcommand(const char* name, const char* help);
  void require_subcommand();

  /// `value` receives what is parsed, keeps its value otherwise, and must live until then. A name
  /// that starts with no dash is that of a positional argument. Types: those that options.cc
  /// instantiates it for.
  template <class Value>
  Option add_option(const char* name, Value& value, const char* help);
  Option add_flag(const char* name, bool& value, const char* help);
  void add_backend_option(std::string& value);  ///< --backend

  /// Called by Parser::parse() when this sub-command was asked for.
  void on_parsed(std::function<void()> action);

 private:
  CLI::App* app_;
};

class Parser {
 public:
  Parser(const char* description, const std::string& version);
  ~Parser();

  [[nodiscard]] Command program();

  /// Parses, and runs the action of the sub-command, whose exceptions pass through. Returns the
  /// exit status where parsing ended the program: 0 after --help and --version, 2 after a mistake
  /// in the arguments, which has been printed. Else nothing. A mistake is also an output in the
  /// place of a file that is read, or of another output.
  [[nodiscard]] std::optional<int> parse(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}  // namespace sluice::cli
