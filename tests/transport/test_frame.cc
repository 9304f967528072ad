// Frames: what was appended comes out in order, and any change of any byte is an error.
#include <gmock/gmock.h>

#include <cstring>

#include "transport/frame.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::byte> pattern(std::size_t bytes, int seed) {
  std::vector<std::byte> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(i * 7 + seed);
  return data;
}

std::vector<std::byte> sample(std::uint64_t sequence) {
  FrameWriter writer;
  writer.append({.kind = RecordKind::kPut, .object = 3, .at = 128}, pattern(37, 1));
  writer.append({.kind = RecordKind::kPut, .object = 3, .at = 0}, pattern(8, 2));
  writer.append({.kind = RecordKind::kSignal, .object = 3, .flag = 5, .at = 17}, {});
  return writer.seal(sequence, {});
}

std::string read(std::span<const std::byte> frame, std::uint64_t sequence, int* num_records) {
  return read_frame(frame, sequence,
                    [&](const Record&, std::span<const std::byte>) { ++*num_records; });
}

TEST(Frame, RecordsComeOutInOrder) {
  std::vector<Record> records;
  std::vector<std::vector<std::byte>> payloads;
  const auto frame = sample(9);
  EXPECT_THAT(read_frame(frame, 9,
                         [&](const Record& record, std::span<const std::byte> payload) {
                           records.push_back(record);
                           payloads.emplace_back(payload.begin(), payload.end());
                         }),
              IsEmpty());
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(records[0].at, 128u);
  EXPECT_EQ(payloads[0], pattern(37, 1));
  EXPECT_EQ(payloads[1], pattern(8, 2));
  EXPECT_EQ(records[2].kind, RecordKind::kSignal);
  EXPECT_EQ(records[2].flag, 5u);
  EXPECT_EQ(records[2].at, 17u);
}

TEST(Frame, EveryChangedByteIsSeenAndNothingIsApplied) {
  const auto good = sample(4);
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int bit : {0, 3, 7}) {
      auto bad = good;
      bad[i] ^= static_cast<std::byte>(1 << bit);
      int applied = 0;
      EXPECT_NE(read(bad, 4, &applied), "") << "byte " << i;
      EXPECT_EQ(applied, 0) << "byte " << i;
    }
  }
}

TEST(Frame, EveryTruncationIsSeen) {
  const auto good = sample(4);
  for (std::size_t size = 0; size < good.size(); ++size) {
    int applied = 0;
    EXPECT_THAT(read(std::span(good).first(size), 4, &applied), HasSubstr("bytes")) << size;
    EXPECT_EQ(applied, 0);
  }
}

TEST(Frame, ALostOrRepeatedFrameIsNamedByNumber) {
  int applied = 0;
  EXPECT_EQ(read(sample(6), 5, &applied), "message number 6 where number 5 was expected");
  EXPECT_EQ(read(sample(4), 5, &applied), "message number 4 where number 5 was expected");
  EXPECT_EQ(applied, 0);
}

TEST(Frame, IsNeverLargerThanItsLimit) {
  FrameWriter writer;
  std::size_t records = 0;
  while (writer.fits(100)) writer.append({}, pattern(100, 0)), ++records;
  EXPECT_GT(records, 900u);
  if (writer.room() > 0) writer.append({}, pattern(writer.room(), 0)), ++records;
  const auto frame = writer.seal(0, {});
  EXPECT_LE(frame.size(), kFrameBytes);
  int applied = 0;
  EXPECT_EQ(read(frame, 0, &applied), "");
  EXPECT_EQ(applied, static_cast<int>(records));
}

}  // namespace
}  // namespace sluice
