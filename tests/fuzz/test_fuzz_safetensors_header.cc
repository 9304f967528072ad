// Replays the fuzz corpus and thousands of mutations of it in every test run. The entry point
// aborts on a broken promise, so returning is passing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;

std::vector<Bytes> read_corpus() {
  std::vector<std::filesystem::path> paths;
  for (const auto& file : std::filesystem::directory_iterator(SLUICE_FUZZ_CORPUS)) {
    paths.push_back(file.path());
  }
  std::ranges::sort(paths);
  std::vector<Bytes> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

/// Runs on a copy of exact size, so that a sanitizer sees the first byte read past the end.
void run(const Bytes& input) {
  const auto copy = std::make_unique<std::uint8_t[]>(input.size());
  std::copy(input.begin(), input.end(), copy.get());
  EXPECT_EQ(LLVMFuzzerTestOneInput(copy.get(), input.size()), 0);
}

/// Sets the header length to what the file has, so that mutations reach the JSON.
void repair_length(Bytes& bytes, std::uint64_t data_bytes) {
  if (bytes.size() < 8 + data_bytes) return;
  const std::uint64_t length = bytes.size() - 8 - data_bytes;
  std::memcpy(bytes.data(), &length, sizeof length);
}

void mutate(Bytes& bytes, const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  static const std::string kWords[] = {"\"dtype\":",
                                       "\"shape\":[",
                                       "\"data_offsets\":[",
                                       "\"F32\"",
                                       "18446744073709551615",
                                       "{",
                                       "}",
                                       "[",
                                       "]",
                                       "\\ud800",
                                       ",",
                                       "\"",
                                       "0",
                                       "-1",
                                       "1e9"};
  const std::size_t at = bytes.empty() ? 0 : random() % bytes.size();
  const auto where = bytes.begin() + static_cast<std::ptrdiff_t>(at);
  switch (random() % 6) {
    case 0:
      if (!bytes.empty()) bytes[at] = static_cast<std::uint8_t>(random());
      break;
    case 1:
      if (!bytes.empty()) bytes[at] ^= static_cast<std::uint8_t>(1U << random() % 8);
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3: {
      const std::string& word = kWords[random() % std::size(kWords)];
      bytes.insert(where, word.begin(), word.end());
      break;
    }
    case 4: {
      const Bytes& other = corpus[random() % corpus.size()];
      bytes.insert(where, other.begin() + std::min<std::ptrdiff_t>(8, std::ssize(other)),
                   other.end());
      break;
    }
    default:
      bytes.erase(where, where + std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(random() % 9),
                                                          bytes.end() - where));
  }
}

TEST(FuzzSafetensorsHeader, Corpus) {
  const auto corpus = read_corpus();
  ASSERT_GE(corpus.size(), 20U);
  for (const Bytes& input : corpus) run(input);
}

TEST(FuzzSafetensorsHeader, EveryPrefixOfTheCorpus) {
  for (const Bytes& input : read_corpus()) {
    for (std::size_t length = 0; length < input.size(); ++length) {
      run(Bytes(input.begin(), input.begin() + static_cast<std::ptrdiff_t>(length)));
    }
  }
}

TEST(FuzzSafetensorsHeader, RandomMutations) {
  constexpr int kNumMutations = 50'000;
  const auto corpus = read_corpus();
  std::mt19937_64 random(20260101);
  for (int i = 0; i < kNumMutations; ++i) {
    Bytes bytes = corpus[random() % corpus.size()];
    const auto num_steps = 1 + random() % 4;
    for (std::uint64_t step = 0; step < num_steps; ++step) mutate(bytes, corpus, random);
    if (random() % 2 == 0) repair_length(bytes, random() % 16);
    run(bytes);
  }
}

}  // namespace
