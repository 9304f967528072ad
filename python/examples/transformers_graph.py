"""Greedy generation of a model with Sluice's experts, whose decode step is one CUDA graph.

python python/examples/transformers_graph.py [--device cuda] [--batch 4] [--sluice PATH]

A graph is launched by one call, where a step of transformers makes hundreds: on small batches most of a step is
the host's time. The tokens must be the same.
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
from transformers import AutoModelForCausalLM, StaticCache
from transformers_generate import make

import sluice.integrations.transformers  # noqa: F401  Registers w4afp8.


class Decoder:
    """Decodes greedily from a prompt [B, L], one token of each row in a step: token [B, 1].

    The cache has room for `max_tokens` of each row, so that every step reads and writes the same addresses."""

    @torch.no_grad()
    def __init__(self, model, prompt, max_tokens):
        self.model, self.graph = model, None
        self.cache = StaticCache(model.config, max_cache_len=max_tokens)
        logits = model(prompt, cache=self.cache, logits_to_keep=1).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def step(self):
        logits = self.model(self.token, cache=self.cache).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def capture(self):
        """Runs a step, which makes whatever a first call makes, and captures the next as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def next(self):
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()


def greedy(model, prompt, num_tokens, use_graph=False):
    """[B, L] -> the next num_tokens of each row, and how many came in a second after the second of each row."""
    decoder = Decoder(model, prompt, prompt.shape[1] + num_tokens)
    tokens = [decoder.token.clone()]
    (decoder.capture if use_graph else decoder.next)()
    tokens.append(decoder.token.clone())
    wait = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(num_tokens - 2):
        decoder.next()
        tokens.append(decoder.token.clone())
    wait()
    return torch.cat(tokens, 1), len(prompt) * (num_tokens - 2) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sluice", default=os.environ.get("SLUICE_COMMAND") or shutil.which("sluice"))
    arguments = parser.parse_args()
    if not arguments.sluice:
        sys.exit("the program sluice is not on the PATH; name it with --sluice")
    # cuDNN's attention, which torch prefers on Hopper, may give other last bits from call to call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with tempfile.TemporaryDirectory() as folder:
        published, converted = Path(folder) / "deepseek_v3", Path(folder) / "deepseek_v3-w4afp8"
        make("deepseek_v3", published)
        subprocess.run([arguments.sluice, "convert", "--from", published, "--to", converted,
                        "--format", "w4afp8", "--scale", "amax7"], check=True, stdout=subprocess.DEVNULL)
        model = AutoModelForCausalLM.from_pretrained(converted, device_map=arguments.device)
    prompt = torch.arange(12 * arguments.batch, device=arguments.device).reshape(-1, 12) % 1000
    tokens, rate = greedy(model, prompt, 32)
    print(f"{len(prompt)} prompts, {tokens.shape[1]} tokens each, on {arguments.device}")
    print(f"  step by step: {rate:.1f} tokens/s")
    same = True
    if prompt.is_cuda:
        replayed, rate = greedy(model, prompt, 32, use_graph=True)
        same = torch.equal(replayed, tokens)
        print(f"  a CUDA graph: {rate:.1f} tokens/s, {'the same tokens' if same else 'tokens DIFFER'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
