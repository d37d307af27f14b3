"""Train the small demonstration model on the Python standard library, on a CPU.

    python tools/train_demo_model.py --out albireo/demo

The run is fixed by its seed and its number of steps, never by the clock.  It needs torch, tokenizers, safetensors,
numpy and tqdm, and the sources of the interpreter that runs it; a C++ compiler lets ``torch.compile`` speed it up.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from demo_model import corpus, export
from demo_model.model import DemoConfig, DemoLlama
from demo_model.optim import Muon, learning_rate_scale, momentum_at

SEED = 20
MUON_LR = 0.02
ADAMW_LR = 0.006
SAMPLE_PROMPTS = ('def read_config(path):\n    """', "class Queue:\n    def __init__(self")


def arithmetic() -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32 (emulated bfloat16 is far slower)."""
    flags = torch.backends.cpu.get_cpu_capability()
    fast = flags.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@torch.no_grad()
def bits_per_byte(model: DemoLlama, documents: list[npt.NDArray[np.int64]], text_bytes: int, batch: int) -> float:
    """Held-out bits per UTF-8 byte: all tokens predicted once, in adjacent windows of the full context.

    The prediction of each document's leading end-of-text token is counted too, except the first.
    """
    stream = torch.from_numpy(np.concatenate(documents))
    context = model.config.max_position_embeddings
    whole = (len(stream) - 1) // context
    windows = torch.stack([stream[i * context : (i + 1) * context + 1] for i in range(whole)])
    nats = 0.0
    for start in range(0, whole, batch):
        nats += float(model.loss(windows[start : start + batch], "sum"))
    rest = stream[whole * context :]
    if len(rest) > 1:
        nats += float(model.loss(rest[None], "sum"))
    return nats / math.log(2) / text_bytes


def train(args: argparse.Namespace) -> None:
    """Train, save to ``args.out``, reload what was saved and print two completions."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    config = DemoConfig()
    texts = corpus.load_corpus()
    tokenizer = corpus.train_tokenizer(texts.train, config.vocab_size)
    documents = corpus.encode_documents(tokenizer, texts.train)
    held_out = corpus.encode_documents(tokenizer, texts.held_out)
    held_out_bytes = sum(len(t.encode()) for t in texts.held_out)
    sampler = corpus.WindowSampler(documents, config.max_position_embeddings, SEED)
    print(
        f"{len(texts.train)} modules, {sum(len(t.encode()) for t in texts.train) / 1e6:.2f} MB, "
        f"{sum(map(len, documents)) / 1e6:.2f}M tokens; held out {len(held_out)} modules, {held_out_bytes} bytes"
    )

    model = DemoLlama(config)
    dtype = arithmetic()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices, MUON_LR, dtype)
    adamw = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtype}, {torch.get_num_threads()} threads")

    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.loss(windows)

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    progress = tqdm(range(args.steps), unit="step", mininterval=5)
    for step in progress:
        windows = torch.from_numpy(sampler.batch(args.batch))
        loss = step_loss(windows)
        torch.autograd.backward(loss)
        scale = learning_rate_scale(step, args.steps)
        muon.step(scale, momentum_at(step))
        adamw.param_groups[0]["lr"] = ADAMW_LR * scale
        adamw.step()
        model.zero_grad(set_to_none=True)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            progress.write(
                f"step {step + 1}: {bits_per_byte(model, held_out, held_out_bytes, args.batch):.4f} bits/byte"
            )

    export.round_to_bfloat16(model)
    result = export.RunResult(
        bits_per_byte=bits_per_byte(model, held_out, held_out_bytes, args.batch),
        steps=args.steps,
        tokens=args.steps * args.batch * config.max_position_embeddings,
        modules=len(texts.train),
        megabytes=sum(len(t.encode()) for t in texts.train) / 1e6,
        held_out=len(held_out),
        arithmetic=str(dtype).removeprefix("torch.") + (" autocast" if dtype == torch.bfloat16 else ""),
    )
    minutes = (time.monotonic() - started) / 60
    print(f"final: {result.bits_per_byte:.4f} held-out bits/byte with bfloat16 weights, {minutes:.1f} minutes")
    export.save(args.out, model, tokenizer, result)
    show_samples(args.out)


def show_samples(folder: Path) -> None:
    """Reload the saved files and print one completion for each sample prompt."""
    model, tokenizer = export.load(folder)
    generator = torch.Generator().manual_seed(SEED)
    for prompt in SAMPLE_PROMPTS:
        print("=" * 80)
        print(export.complete(model, tokenizer, prompt, 160, generator))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model's files")
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows of 512 tokens a step (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=400, help="steps between held-out measurements")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
