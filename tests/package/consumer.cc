// Includes every public header, and links the parts with third-party dependencies of their own.
#include "sluice/activation.h"
#include "sluice/backend.h"
#include "sluice/balance.h"
#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/engine.h"
#include "sluice/error.h"
#include "sluice/exchange.h"
#include "sluice/experts.h"
#include "sluice/hosts.h"
#include "sluice/interrupt.h"
#include "sluice/lab/accuracy.h"
#include "sluice/lab/convert.h"
#include "sluice/lab/exchange_bench.h"
#include "sluice/lab/experts_bench.h"
#include "sluice/lab/files.h"
#include "sluice/lab/layer_bench.h"
#include "sluice/lab/load_bench.h"
#include "sluice/lab/median.h"
#include "sluice/lab/model_bench.h"
#include "sluice/lab/network_model.h"
#include "sluice/lab/parallel.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/synthetic.h"
#include "sluice/lab/token_spread.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/layer_config.h"
#include "sluice/layer_stats.h"
#include "sluice/loading.h"
#include "sluice/local_experts.h"
#include "sluice/matrix_source.h"
#include "sluice/network.h"
#include "sluice/network_bytes.h"
#include "sluice/placement.h"
#include "sluice/placement_files.h"
#include "sluice/quant.h"
#include "sluice/rebalance.h"
#include "sluice/recipe.h"
#include "sluice/repack.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"
#include "sluice/transport.h"
#include "sluice/weight_format.h"

int main() {
  try {
    (void)sluice::Checkpoint::open("/nonexistent");
    return 1;
  } catch (const sluice::Error& error) {
    if (error.code() != sluice::ErrorCode::kIo) return 2;
  }
  const auto backend = sluice::make_backend({.num_threads = 1});
  const auto transports = sluice::make_inproc_transports(2);
  return backend->allocate(64)->bytes() >= 64 && transports.size() == 2 ? 0 : 3;
}
