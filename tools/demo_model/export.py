"""Write the trained model as a Hugging Face folder, and read it back."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from demo_model.corpus import END_OF_TEXT
from demo_model.model import DemoConfig, DemoLlama

# Default sampling: chosen by reading completions of the trained model.
SAMPLING: dict[str, float | int] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}

# Users' words become docstrings, which code follows; answers stay as they are.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}\n\n"
    '{% else %}"""{{ message.content }}"""\n\n{% endif %}'
    "{% endfor %}"
)

NOTICE = """\
The weights and the tokenizer in this folder were trained on modules of the
Python {version} standard library, which is distributed under the Python Software
Foundation License Version 2.

    {copyright}; All Rights Reserved

The licence text is at https://docs.python.org/3/license.html.  Modules whose
source carries another licence notice were left out of the training text.  The
Python Software Foundation has neither made nor endorsed this model.  "Python"
is a trademark of the Python Software Foundation.
"""

README = """\
# Demonstration model

A {parameters:.2f}M-parameter Llama-style language model that writes Python-like text. It exists so that the
engine can be tried and tested without downloading anything; it is not useful for programming.

- Shape: {c.num_hidden_layers} layers, hidden size {c.hidden_size}, {c.num_attention_heads} query heads and \
{c.num_key_value_heads} key-value heads of {c.head_dim}, SwiGLU of {c.intermediate_size},
  vocabulary {c.vocab_size} (byte-level BPE, tied embeddings), context {c.max_position_embeddings} tokens, bfloat16.
- Training text: {r.modules} modules ({r.megabytes:.1f} MB) of the Python {version} standard library, without tests and
  without modules that carry a licence notice of their own; see `NOTICE`.
- Training: `python tools/train_demo_model.py --out albireo/demo`; {r.steps:,} steps, {r.tokens:,} tokens,
  Muon and AdamW, {arithmetic}, on a {threads}-core CPU.
- Result: **{r.bits_per_byte:.3f} bits per byte** on {r.held_out} held-out modules (adjacent windows of \
{c.max_position_embeddings} tokens,
  bfloat16 weights, float32 arithmetic).
- Default sampling (`generation_config.json`): temperature {s[temperature]}, top-p {s[top_p]}, top-k {s[top_k]}.
- Limits: the text has the look of Python but means nothing: names are invented, lines repeat, code does not
  work, passages of the training text can be repeated. It follows no instructions; the chat template merely turns
  messages into docstrings for it to continue. It knows no language but Python and the English of its docstrings.
"""


@dataclass(frozen=True)
class RunResult:
    """What a finished run reports: held-out bits per byte, and how it was reached."""

    bits_per_byte: float
    steps: int
    tokens: int
    modules: int
    megabytes: float
    held_out: int
    arithmetic: str


@torch.no_grad()
def round_to_bfloat16(model: DemoLlama) -> None:
    """Round every weight to the nearest bfloat16 value, kept in float32: what a reader of the saved file gets."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save(folder: Path, model: DemoLlama, tokenizer: Tokenizer, result: RunResult) -> None:
    """Write configuration, weights (bfloat16, tied), tokenizer, model card and notice into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": c.num_attention_heads,
            "num_hidden_layers": c.num_hidden_layers,
            "num_key_value_heads": c.num_key_value_heads,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": c.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": c.vocab_size,
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": c.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "do_sample": True, "eos_token_id": 0, **SAMPLING},
    )
    version = platform.python_version()
    notice = NOTICE.format(version=version, copyright=sys.copyright.splitlines()[0].rstrip("."))
    (folder / "NOTICE").write_text(notice, encoding="utf-8")
    card = README.format(
        c=c,
        r=result,
        s=SAMPLING,
        version=version,
        arithmetic=result.arithmetic,
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def load(folder: Path) -> tuple[DemoLlama, Tokenizer]:
    """Read a saved folder back into the training model (weights widened to float32) and its tokenizer."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoLlama(DemoConfig(**{name: values[name] for name in DemoConfig.__dataclass_fields__}))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def complete(
    model: DemoLlama,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    generator: torch.Generator,
    sampling: dict[str, float | int] | None = None,
) -> str:
    """Prompt and sampled completion as text; ends at ``<|endoftext|>``, ``max_tokens`` or a full context."""
    s = sampling or SAMPLING
    ids = tokenizer.encode(prompt).ids
    for _ in range(min(max_tokens, model.config.max_position_embeddings - len(ids))):
        logits = model(torch.tensor([ids]))[0, -1] / s["temperature"]
        top, indices = logits.topk(int(s["top_k"]))
        weights = top.softmax(-1)
        weights = weights.where(weights.cumsum(-1) - weights < s["top_p"], 0.0)
        token = int(indices[torch.multinomial(weights, 1, generator=generator)])
        if token == 0:
            break
        ids.append(token)
    return tokenizer.decode(ids)
