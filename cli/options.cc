#include "options.h"

#include <fmt/core.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

namespace sluice::cli {
namespace {

/// CLI::Range as the help shows it, with a message that says what else than a number is wrong.
template <class Value>
CLI::Validator in_range(Value low, Value high) {
  CLI::Validator validator = CLI::Range(low, high);
  validator.operation([low, high](const std::string& text) {
    Value value{};
    if (CLI::detail::lexical_cast(text, value) && value >= low && value <= high) {
      return std::string();
    }
    const char* const kind = std::is_integral_v<Value> ? "whole number" : "number";
    return fmt::format("'{}' is not a {} in [{}, {}]", text, kind, low, high);
  });
  return validator;
}

/// "0", "-17"; neither "010", which the library takes for 8, nor "0x10", "+5" or "1_000".
bool is_decimal(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  if (text.empty() || (text.size() > 1 && text[0] == '0')) return false;
  return std::ranges::all_of(text, [](char c) { return c >= '0' && c <= '9'; });
}

/// Refuses what the library takes for another number than it seems to be. Everything else is left
/// to it, and to the check of the option itself.
template <class Value>
std::string check_whole_number(const std::string& text) {
  // The library's own conversion takes -1, also behind white space, for the largest number.
  if (std::is_unsigned_v<Value> && text.starts_with('-')) return text + " is below 0";
  const bool begins_like_one = !text.empty() && text[0] >= '0' && text[0] <= '9';
  if (std::is_unsigned_v<Value> && !begins_like_one) return "'" + text + "' is not a number";
  Value value{};
  if (!is_decimal(text)) {
    const bool is_taken = CLI::detail::lexical_cast(text, value);
    return is_taken ? "'" + text + "' is not a whole number in decimal, such as 10" : "";
  }
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc::result_out_of_range || sizeof(Value) < 8) return {};
  return fmt::format("'{}' is not in [{}, {}]", text, std::numeric_limits<Value>::min(),
                     std::numeric_limits<Value>::max());
}

/// The same of a number with a fraction: "0x10" is 16 for the library, "1_000" is 1000.
template <class Value>
std::string check_real_number(const std::string& text) {
  Value value{};
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end == text.data() + text.size() && problem != std::errc::invalid_argument) return {};
  const bool is_taken = CLI::detail::lexical_cast(text, value);
  return is_taken ? "'" + text + "' is not a number in decimal, such as 1.5" : "";
}

/// Names of the validators of files that are read and of those that are written.
constexpr const char *kIsRead = "is read", *kIsWritten = "is written";
/// Of one that is read, followed by the option of the output that may take its place.
const std::string kGivesWayTo = "gives way to ";

bool has_validator(CLI::Option* option, const std::string& name) {
  try {
    return option->get_validator(name) != nullptr;
  } catch (const CLI::OptionNotFound&) {
    return false;
  }
}

/// Also through links. A device never is one: nothing of it is lost.
bool is_same_file(const std::string& a, const std::string& b) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (fs::exists(a, ignored) && fs::exists(b, ignored)) {
    return fs::is_regular_file(a, ignored) && fs::equivalent(a, b, ignored);
  }
  const auto place = [&](const std::string& path) {
    return fs::weakly_canonical(fs::absolute(path, ignored), ignored);
  };
  return place(a) == place(b);
}

/// Throws: CLI::ValidationError naming both options if an output of `app`, or of the program, is to
/// take the place of a file that is read, or of another output.
void refuse_lost_files(CLI::App* app) {
  std::vector<CLI::Option*> files;
  for (CLI::App* at = app; at != nullptr; at = at->get_parent()) {
    for (CLI::Option* option : at->get_options()) {
      const bool is_file = has_validator(option, kIsRead) || has_validator(option, kIsWritten);
      if (is_file && option->count() > 0) files.push_back(option);
    }
  }
  for (CLI::Option* output : files) {
    if (!has_validator(output, kIsWritten)) continue;
    for (CLI::Option* other : files) {
      const auto path = output->as<std::string>();
      if (other == output || !is_same_file(path, other->as<std::string>())) continue;
      if (has_validator(other, kGivesWayTo + output->get_name())) continue;
      throw CLI::ValidationError(
          fmt::format("{} {}", output->get_name(), path),
          fmt::format("is the file of {}, which would be replaced", other->get_name()));
    }
  }
}

template <class Value>
struct ElementOf {
  using Type = Value;
};
template <class Value>
struct ElementOf<std::vector<Value>> {
  using Type = Value;
};

}  // namespace

Option Option::required() {
  option_->required();
  return *this;
}

Option Option::range(int low, int high) {
  option_->check(in_range(low, high));
  return *this;
}

Option Option::range(double low, double high) {
  option_->check(in_range(low, high));
  return *this;
}

Option Option::non_negative() {
  // CLI::NonNegativeNumber is a range up to the largest double, whose 309 digits its message has.
  option_->check([](const std::string& text) {
    constexpr int kMax = std::numeric_limits<int>::max();
    int value = 0;
    if (CLI::detail::lexical_cast(text, value) && value >= 0) return std::string();
    return fmt::format("'{}' is not a whole number in [0, {}]", text, kMax);
  });
  return *this;
}

Option Option::positive() {
  option_->check([](const std::string& text) {
    float value = 0;
    if (CLI::detail::lexical_cast(text, value) && std::isnormal(value) && value > 0) {
      return std::string();
    }
    return fmt::format("'{}' is not a positive float32", text);
  });
  return *this;
}

Option Option::not_empty() {
  option_->check([](const std::string& value) {
    return value.empty() ? std::string("is empty") : std::string();
  });
  return *this;
}

Option Option::one_of(const std::vector<std::string>& values) {
  option_->check(CLI::IsMember(values));
  return *this;
}

Option Option::one_of(std::initializer_list<int> values) {
  option_->check(CLI::IsMember(std::vector<int>(values)));
  return *this;
}

Option Option::existing_file() {
  CLI::Validator validator = CLI::ExistingFile;
  option_->check(validator.name(kIsRead));
  return *this;
}

Option Option::gives_way_to(const char* output) {
  const auto takes_all = [](const std::string&) { return std::string(); };
  option_->check(takes_all, "", kGivesWayTo + output);
  return *this;
}

Option Option::existing_directory() {
  option_->check(CLI::ExistingDirectory);
  return *this;
}

Option Option::writable_file() {
  const auto check = [](const std::string& value) -> std::string {
    if (value.empty()) return "the name of the file is empty";
    const std::filesystem::path path(value);
    std::error_code ignored;  // What cannot be looked at does not exist for us.
    if (std::filesystem::is_directory(path, ignored)) return value + " is a directory";
    const bool is_there = std::filesystem::exists(path, ignored);
    if (is_there && access(value.c_str(), W_OK) != 0) return value + " cannot be written";
    if (is_there && !std::filesystem::is_regular_file(path, ignored)) return "";  // A device.
    // A file is replaced by one that is made beside it, or beside what a link names.
    auto place = is_there ? std::filesystem::canonical(path, ignored) : path;
    for (int links = 0; !is_there && links < 40; ++links) {
      const auto next = std::filesystem::read_symlink(place, ignored);
      if (ignored) break;
      place = place.parent_path() / next;
    }
    const std::string parent = place.has_parent_path() ? place.parent_path().string() : ".";
    if (!std::filesystem::is_directory(parent, ignored)) return "there is no folder " + parent;
    return access(parent.c_str(), W_OK) == 0 ? "" : "no file can be made in " + parent;
  };
  option_->check(check, "", kIsWritten);
  return *this;
}

Option Option::comma_separated() {
  option_->delimiter(',');
  return *this;
}

Option Option::type_name(const char* name) {
  option_->type_name(name);
  return *this;
}

Option Option::shows_default() {
  option_->capture_default_str();
  return *this;
}

Command Command::add_subcommand(const char* name, const char* help) {
  return Command(app_->add_subcommand(name, help));
}

void Command::require_subcommand() {
  app_->require_subcommand(1);
}

template <class Value>
Option Command::add_option(const char* name, Value& value, const char* help) {
  CLI::Option* const option = app_->add_option(name, value, help);
  using Element = typename ElementOf<Value>::Type;
  if constexpr (std::is_integral_v<Element>) option->check(check_whole_number<Element>);
  if constexpr (std::is_floating_point_v<Element>) option->check(check_real_number<Element>);
  return Option(option);
}

template Option Command::add_option(const char*, int&, const char*);
template Option Command::add_option(const char*, std::int64_t&, const char*);
template Option Command::add_option(const char*, std::uint64_t&, const char*);
template Option Command::add_option(const char*, float&, const char*);
template Option Command::add_option(const char*, double&, const char*);
template Option Command::add_option(const char*, std::string&, const char*);
template Option Command::add_option(const char*, std::vector<int>&, const char*);
template Option Command::add_option(const char*, std::vector<std::int64_t>&, const char*);
template Option Command::add_option(const char*, std::vector<std::string>&, const char*);

Option Command::add_flag(const char* name, bool& value, const char* help) {
  return Option(app_->add_flag(name, value, help));
}

void Command::add_backend_option(std::string& value) {
  add_option("--backend", value, "cpu | cuda").one_of({"cpu", "cuda"}).shows_default();
}

void Command::on_parsed(std::function<void()> action) {
  app_->callback([app = app_, action = std::move(action)] {
    refuse_lost_files(app);
    action();
  });
}

Parser::Parser(const char* description, const std::string& version)
    : app_(std::make_unique<CLI::App>(description)) {
  app_->set_version_flag("--version", version);
  app_->fallthrough();
}

Parser::~Parser() = default;

Command Parser::program() {
  return Command(app_.get());
}

std::optional<int> Parser::parse(int argc, char** argv) {
  try {
    app_->parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // What it does not know is named before what it misses.
    const std::vector<std::string> rest = app_->remaining(/*recurse=*/true);
    const auto code = static_cast<CLI::ExitCodes>(error.get_exit_code());
    if ((code == CLI::ExitCodes::RequiredError || code == CLI::ExitCodes::ExtrasError) &&
        !rest.empty()) {
      const CLI::App* at = app_.get();
      while (!at->get_subcommands().empty()) at = at->get_subcommands().front();
      const std::string problem =
          at->get_require_subcommand_min() > 0
              ? fmt::format("'{}' is no command", rest.front())
              : fmt::format("{} does not take: {}", at->get_name(), fmt::join(rest, " "));
      fmt::print(stderr, "{}\nRun with --help for more information.\n", problem);
      return 2;
    }
    return app_->exit(error) == 0 ? 0 : 2;
  }
  return std::nullopt;
}

}  // namespace sluice::cli
