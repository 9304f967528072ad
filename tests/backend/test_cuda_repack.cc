// Repacking on a CUDA device from memory in every order, against the bytes of prepare().
#include "backend/cuda/cuda_experts.h"
#include "repack_fixture.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

class CudaRepackTest : public CudaBackendTest {
 protected:
  PackedBytes bytes_of() {
    return [this](const PreparedExperts& prepared) {
      const auto& experts = static_cast<const CudaExperts&>(prepared);
      Bytes all(experts.bytes() + 1);
      backend_->copy_to_host(all.data(), experts.packed.gate_up, experts.bytes(), stream_);
      all.back() = static_cast<std::uint8_t>(experts.code);
      return all;
    };
  }
};

TEST_F(CudaRepackTest, EveryOrderGivesTheBytesOfPrepare) {
  expect_the_bytes_of_prepare(*backend_, bytes_of());
}

TEST_F(CudaRepackTest, ManyExpertsAtOnce) {
  expect_many_experts(*backend_, bytes_of());
}

TEST_F(CudaRepackTest, InTheMemoryOfTheCodes) {
  expect_packing_in_place(*backend_, bytes_of());
}

TEST_F(CudaRepackTest, DownInThePlaceOfGateAndUp) {
  expect_down_is_read_first(*backend_, bytes_of());
}

TEST_F(CudaRepackTest, BadScalesAreNamed) {
  expect_bad_scales_are_named(*backend_);
}

}  // namespace
}  // namespace sluice::testing
