"""Two small mixture-of-experts models made, converted to INT4 and run: by transformers and by Sluice.

python python/examples/transformers_generate.py [--device cpu] [--sluice PATH]

The weights are random, so the text means nothing; everything else is as with a published model.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sluice.integrations.transformers  # noqa: F401  Registers w4afp8, and "sluice" for experts.

SIZES = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
         "num_hidden_layers": 3, "num_attention_heads": 8, "num_experts_per_tok": 4, "max_position_embeddings": 512,
         "bos_token_id": 0, "eos_token_id": None, "dtype": "bfloat16"}
MODELS = {
    "deepseek_v3": {"n_routed_experts": 32, "num_key_value_heads": 8, "first_k_dense_replace": 1, "q_lora_rank": 128,
                    "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64},
    "qwen3_moe": {"num_experts": 32, "num_key_value_heads": 2, "head_dim": 64},
}
TOKENS = 32


def make(model_type, folder):
    """A model with random weights, as transformers saves it."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def generate(model, prompt):
    """Tokens, chosen greedily, and how many came in a second."""
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    # What is made at a first call is made now. A GPU has more of that, and is fast.
    model.generate(prompt, **{**options, "max_new_tokens": TOKENS if prompt.is_cuda else 2})
    start = time.perf_counter()
    tokens = model.generate(prompt, **options)[:, prompt.shape[1]:]
    return tokens, tokens.numel() / (time.perf_counter() - start)


def expert_bytes(model):
    ours = sum(getattr(module, "weight_bytes", 0) for module in model.modules())
    return ours or sum(p.nbytes for n, p in model.named_parameters() if ".mlp.experts." in n)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sluice", default=os.environ.get("SLUICE_COMMAND") or shutil.which("sluice"))
    arguments = parser.parse_args()
    if not arguments.sluice:
        sys.exit("the program sluice is not on the PATH; name it with --sluice")
    all_same = True
    with tempfile.TemporaryDirectory() as folder:
        for model_type in MODELS:
            published, converted = Path(folder) / model_type, Path(folder) / f"{model_type}-w4afp8"
            make(model_type, published)
            subprocess.run([arguments.sluice, "convert", "--from", published, "--to", converted,
                            "--format", "w4afp8", "--scale", "amax7"], check=True, stdout=subprocess.DEVNULL)
            own = AutoModelForCausalLM.from_pretrained(published, device_map=arguments.device)
            int4 = AutoModelForCausalLM.from_pretrained(converted, device_map=arguments.device)
            prompt = torch.arange(12, device=arguments.device).reshape(1, 12)
            rows = [("transformers, bf16", own, *generate(own, prompt)), ("Sluice, INT4", int4, *generate(int4, prompt))]
            print(f"{model_type}: {type(int4).__name__}")
            for name, model, _, rate in rows:
                print(f"  {name}: {rate:.1f} tokens/s, experts {expert_bytes(model) / 1e6:.2f} MB")
            # The same experts from the model that is loaded in bf16: quantized here, by the same rule.
            own.set_experts_implementation("sluice")
            same = torch.equal(generate(own, prompt)[0], rows[1][2])
            all_same = all_same and same
            print(f"  quantized while it runs: {'the same tokens' if same else 'tokens DIFFER'}")
    sys.exit(0 if all_same else 1)


if __name__ == "__main__":
    main()
