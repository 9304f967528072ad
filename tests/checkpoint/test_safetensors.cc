// The container: every way in which a header can lie is refused, with file, tensor, value and
// limit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "checkpoint/json_reader.h"
#include "checkpoint/safetensors.h"
#include "expect_error.h"
#include "model_files.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using testing::expect_error;
using testing::safetensors_bytes;

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors_header(std::as_bytes(std::span(file)), "F.safetensors");
}

SafetensorsHeader parse(const std::string& header, const std::string& data) {
  return parse(safetensors_bytes(header, data));
}

void expect_corrupt(const std::string& header, const std::string& data,
                    std::vector<std::string> parts) {
  parts.push_back("F.safetensors");
  expect_error(ErrorCode::kCorruptFile, parts, [&] { (void)parse(header, data); });
}

const std::string kTwoTensors = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                R"("b":{"dtype":"I8","shape":[2,2],"data_offsets":[8,12]}} )";

TEST(Safetensors, ReadsAGoodHeader) {
  const auto header = parse(kTwoTensors, std::string(12, 'x'));
  ASSERT_EQ(header.tensors.size(), 2U);
  EXPECT_EQ(header.data_begin, 8 + kTwoTensors.size());
  EXPECT_EQ(header.tensors[1].name, "b");
  EXPECT_EQ(header.tensors[1].dtype, "I8");
  EXPECT_THAT(header.tensors[1].shape, ElementsAre(2U, 2U));
  EXPECT_EQ(header.tensors[1].begin, 8U);
  EXPECT_EQ(header.tensors[1].end, 12U);
}

TEST(Safetensors, RefusesAFileCutAtAnyByte) {
  const std::string file = safetensors_bytes(kTwoTensors, std::string(12, 'x'));
  for (std::size_t length = 0; length < file.size(); ++length) {
    expect_error(ErrorCode::kCorruptFile, {"F.safetensors"},
                 [&] { (void)parse(file.substr(0, length)); });
  }
}

TEST(Safetensors, CutDataIsCalledTruncated) {
  expect_corrupt(kTwoTensors, std::string(11, 'x'),
                 {"tensor b", "[8, 12]", "11 data bytes", "truncated?"});
}

TEST(Safetensors, RefusesBytesPastTheLastTensor) {
  expect_corrupt(kTwoTensors, std::string(13, 'x'), {"13 data bytes", "cover only 12"});
}

TEST(Safetensors, RefusesAHugeHeaderLength) {
  for (const std::uint64_t length :
       {std::uint64_t{100'000'001}, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    std::string file = safetensors_bytes("{}", "");
    std::memcpy(file.data(), &length, sizeof length);
    expect_error(ErrorCode::kCorruptFile,
                 {"header length " + std::to_string(length), "above 2", "truncated?"},
                 [&] { (void)parse(file); });
  }
  // A file large enough for such a header still may not have one.
  std::string file = safetensors_bytes("{}", std::string(100'000'010, ' '));
  const std::uint64_t length = 100'000'001;
  std::memcpy(file.data(), &length, sizeof length);
  expect_error(ErrorCode::kCorruptFile, {"header length 100000001", "above 100000000", "most"},
               [&] { (void)parse(file); });
}

TEST(Safetensors, NamesFilesOfAnotherKind) {
  const std::pair<std::string, const char*> rows[] = {
      {"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4302\n",
       "Git LFS pointer"},
      {"<!DOCTYPE html><html><body>404</body></html>", "page of HTML"},
      {"\n<html><head></head></html>", "page of HTML"},
      {R"({"model_type": "deepseek_v3", "hidden_size": 256})", "JSON text"},
      {std::string("PK\x03\x04\x14\0\0\0\x08\0\0\0", 12), "zip archive"},
      {std::string("GGUF\x03\0\0\0\x10\0\0\0", 12), "GGUF file"},
  };
  for (const auto& [file, part] : rows) {
    expect_error(ErrorCode::kUnsupported, {"is no safetensors file, but", part},
                 [&, file = file] { (void)parse(file); });
  }
  // A header may be as long as its length looks like a character.
  const std::string header = "{}" + std::string('{' - 2, ' ');
  EXPECT_EQ(parse(safetensors_bytes(header, "")).tensors.size(), 0U);
}

TEST(Safetensors, RefusesOverlap) {
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},)"
                 R"("b":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}})",
                 "abcd", {"tensor b", "[2, 4]", "overlap tensor a", "ends at 3"});
}

TEST(Safetensors, RefusesAGap) {
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
                 R"("b":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}})",
                 "abcd", {"tensor b", "leave a gap after tensor a", "ends at 1"});
}

TEST(Safetensors, RefusesOffsetsOutOfRange) {
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[5],"data_offsets":[0,5]}})", "abcd",
                 {"tensor a", "[0, 5]", "4 data bytes"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,18446744073709551615]}})",
                 "abcd", {"tensor a", "18446744073709551615"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,18446744073709551616]}})",
                 "abcd", {"not a whole number in [0, 2^64)"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[4,3]}})", "abcd",
                 {"tensor a", "[4, 3]", "backwards"});
}

TEST(Safetensors, RefusesADuplicateName) {
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},)"
                 R"("\u0061":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}})",
                 "abcd", {"'a' occurs twice"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[4],"shape":[4],"data_offsets":[0,4]}})", "abcd",
                 {"'shape' occurs twice"});
}

TEST(Safetensors, RefusesASizeThatIsNotShapeTimesDtype) {
  expect_corrupt(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "abcd",
                 {"tensor a", "hold 4 bytes", "F32 of shape [2] needs 8"});
  expect_corrupt(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", "ab",
                 {"tensor a", "[3] of F4"});
}

TEST(Safetensors, RefusesAShapeThatOverflows) {
  expect_corrupt(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})",
                 "", {"tensor a", "[4294967296, 4294967296]", "no size"});
  expect_corrupt(R"({"a":{"dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,0]}})", "",
                 {"tensor a", "no size"});
  std::string dims = "1";
  for (int i = 0; i < 32; ++i) dims += ",1";
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[)" + dims + R"(],"data_offsets":[0,1]}})", "a",
                 {"tensor a", "more than 32 dimensions"});
}

TEST(Safetensors, AcceptsEmptyTensorsAndScalars) {
  const auto header =
      parse(R"({"z":{"dtype":"F64","shape":[0,18446744073709551615],"data_offsets":[0,0]},)"
            R"("s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
            R"("e":{"dtype":"I8","shape":[0],"data_offsets":[4,4]}})",
            "abcd");
  EXPECT_EQ(header.tensors.size(), 3U);
  EXPECT_EQ(parse("{}", "").tensors.size(), 0U);
}

TEST(Safetensors, ToleratesAnUnknownDtypeOfPlausibleSize) {
  const auto header = parse(R"({"a":{"dtype":"Q3","shape":[8],"data_offsets":[0,3]}})", "abc");
  EXPECT_EQ(header.tensors[0].dtype, "Q3");
  expect_corrupt(R"({"a":{"dtype":"Q3","shape":[7],"data_offsets":[0,3]}})", "abc",
                 {"tensor a", "unknown dtype 'Q3'", "[7]"});
  expect_corrupt(R"({"a":{"dtype":"Q3","shape":[1],"data_offsets":[0,17]}})", std::string(17, 'x'),
                 {"tensor a", "unknown dtype 'Q3'", "[1, 128]"});
  expect_corrupt(R"({"a":{"dtype":"Q3","shape":[0],"data_offsets":[0,1]}})", "x", {"tensor a"});
}

TEST(Safetensors, RefusesMissingAndUnknownFields) {
  expect_corrupt(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", "a", {"tensor a: dtype"});
  expect_corrupt(R"({"a":{"dtype":"I8","data_offsets":[0,1]}})", "a", {"tensor a: shape"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1]}})", "a", {"tensor a: data_offsets"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0]}})", "a",
                 {"tensor a: 1 data_offsets"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1,2]}})", "a",
                 {"tensor a: more than two data_offsets"});
  expect_corrupt(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1],"order":"F"}})", "a",
                 {"tensor a", "unknown field 'order'"});
}

TEST(Safetensors, MetadataHoldsStringsOnly) {
  EXPECT_EQ(parse(R"({"__metadata__":{"format":"pt"}})", "").tensors.size(), 0U);
  expect_corrupt(R"({"__metadata__":{"format":1}})", "", {"'\"' should stand here"});
}

TEST(Safetensors, WrittenHeaderReadsBack) {
  std::vector<SafetensorsEntry> tensors = {
      {.name = "weird \"name\" \xc3\xa9", .dtype = "BF16", .shape = {3, 5}},
      {.name = "scalar", .dtype = "F32", .shape = {}},
      {.name = "four bits", .dtype = "F4", .shape = {2, 3}},
  };
  std::string file = make_safetensors_header(tensors);
  EXPECT_EQ(file.size() % 8, 0U);
  file.append(tensors.back().end, 'x');
  const auto header = parse(file);
  ASSERT_EQ(header.tensors.size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(header.tensors[i].name, tensors[i].name);
    EXPECT_EQ(header.tensors[i].dtype, tensors[i].dtype);
    EXPECT_EQ(header.tensors[i].shape, tensors[i].shape);
    EXPECT_EQ(header.tensors[i].begin, tensors[i].begin);
    EXPECT_EQ(header.tensors[i].end, tensors[i].end);
  }
}

TEST(Safetensors, WriterRefusesWhatHasNoSize) {
  std::vector<SafetensorsEntry> odd = {{.name = "a", .dtype = "F4", .shape = {3}}};
  expect_error(ErrorCode::kInvalidArgument, {"tensor a", "[3]"},
               [&] { (void)make_safetensors_header(odd); });
  std::vector<SafetensorsEntry> unknown = {{.name = "a", .dtype = "Q3", .shape = {8}}};
  expect_error(ErrorCode::kInvalidArgument, {"tensor a", "Q3"},
               [&] { (void)make_safetensors_header(unknown); });
}

/// Every line is a document that must be refused, and a part of the reason.
TEST(JsonReader, RefusesWhatIsNotJson) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "ends where a value"},
      {"{", "ends where"},
      {"[1,]", "no value begins"},
      {"[1 2]", "']' should stand"},
      {"01", "leading zero"},
      {"-", "a digit"},
      {"1.", "a digit"},
      {"1e", "a digit"},
      {"+1", "no value begins"},
      {"NaN", "no value begins"},
      {"tru", "unknown word"},
      {"nul", "unknown word"},
      {"\"a", "inside a string"},
      {"\"\\x\"", "unknown escape"},
      {"\"\\u12g4\"", "hexadecimal"},
      {"\"\\u12", "inside an escape"},
      {"\"\\", "inside an escape"},
      {"\"\n\"", "control character"},
      {"\"\xff\"", "UTF-8"},
      {"\"\xc0\x80\"", "UTF-8"},
      {"\"\xed\xa0\x80\"", "UTF-8"},
      {"\"\xf4\x90\x80\x80\"", "UTF-8"},
      {"\"\xe2\x82", "UTF-8"},
      {"\"\\ud800\"", "surrogate"},
      {"\"\\udc00\"", "surrogate"},
      {"\"\\ud800\\u0041\"", "surrogate"},
      {"{\"a\":1,\"a\":2}", "twice"},
      {"{1:2}", "'\"' should stand"},
      {"{\"a\" 1}", "':' should stand"},
      {"1 1", "follows the end"},
  };
  for (const auto& [text, reason] : cases) {
    expect_error(ErrorCode::kCorruptFile, {"S: JSON, byte ", reason}, [&, t = text] {
      JsonReader json(t, "S");
      json.skip();
      json.finish();
    });
  }
}

TEST(JsonString, IsReadAsTheSameText) {
  EXPECT_EQ(json_string("model.layers.3"), R"("model.layers.3")");
  EXPECT_EQ(json_string("a\"b\\c\n"), R"("a\"b\\c\u000a")");
  std::string text;
  for (int c = 0; c < 128; ++c) text += static_cast<char>(c);
  text += "\xc3\xa9\xf0\x9f\x98\x80";  // Two and four bytes of UTF-8.
  const std::string json = json_string(text);
  JsonReader reader(json, "S");
  EXPECT_EQ(reader.string(), text);
  reader.finish();
}

TEST(JsonReader, BoundsItsDepth) {
  const auto nested = [](int depth) {
    return std::string(static_cast<std::size_t>(depth), '[') +
           std::string(static_cast<std::size_t>(depth), ']');
  };
  const std::string deepest = nested(JsonReader::kMaxDepth);
  JsonReader json(deepest, "S");
  json.skip();
  json.finish();
  const std::string bomb = nested(1'000'000);
  expect_error(ErrorCode::kUnsupported, {"nested deeper than 32"},
               [&] { JsonReader(bomb, "S").skip(); });
  expect_error(ErrorCode::kUnsupported, {"'1e999' does not fit a double"},
               [&] { (void)JsonReader("1e999", "S").number(); });
}

TEST(JsonReader, ReadsValues) {
  const std::string text =
      " {\"a\" : [ 1 , -2.5e1 , true , false , null ] , \"\\u00e9\\ud83d\\ude00\\n\" : {} } ";
  JsonReader json(text, "S");
  std::vector<std::string> keys;
  json.object([&](const std::string& key) {
    keys.push_back(key);
    if (key != "a") return json.skip();
    int i = 0;
    json.array([&] {
      switch (i++) {
        case 0:
          EXPECT_EQ(json.unsigned_integer(), 1U);
          break;
        case 1:
          EXPECT_EQ(json.number(), -25.0);
          break;
        case 2:
          EXPECT_TRUE(json.boolean());
          break;
        case 3:
          EXPECT_FALSE(json.boolean());
          break;
        default:
          EXPECT_EQ(json.peek(), JsonReader::Kind::kNull);
          json.skip();
      }
    });
    EXPECT_EQ(i, 5);
  });
  json.finish();
  EXPECT_THAT(keys, ElementsAre("a", "\xc3\xa9\xf0\x9f\x98\x80\n"));
}

}  // namespace
}  // namespace sluice
