"""Makes tiny checkpoints with random weights, in the format and with the classes of Hugging Face's transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

BOS_ID, EOS_ID = 0, 2
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Config class, model class, and what each family is given beside the common sizes.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"rope_scaling": _LLAMA3_ROPE}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
}


def make_checkpoint(
    directory: Path,
    family: Family,
    *,
    vocab_size: int = 1003,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Writes config, weights and tokeniser to ``directory`` and returns it.

    The defaults run at TP 1, 2, 4 and 8; ``vocab_size`` leaves the ranks unequal shards, and with more ranks than KV
    heads some are replicated. Logits have a standard deviation of about 2.

    Args:
        max_shard_size: of a safetensors file; less than the weights makes several, with an index.
        config: fields of the family's configuration, over the defaults.
    """
    config_class, model_class, of_family = _FAMILIES[family]
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "rms_norm_eps": 1e-6,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": BOS_ID,
        **of_family,
        **config,
    }
    if family == "qwen2":
        del fields["head_dim"]  # its attention takes hidden_size / num_heads
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(name, parameter.shape, generator))
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory, vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokeniser that encodes any text; every id below ``vocab_size`` decodes to something."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 500),
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for token_id in range(len(vocab), vocab_size):
        vocab[f"\u0120w{token_id}"] = token_id  # " w700"; no merge leads there, so only sampling gives it
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL_TOKENS[BOS_ID],
        "eos_token": _SPECIAL_TOKENS[EOS_ID],
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _weights(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.2 * values
    if values.ndim == 1:
        return 1 + 0.05 * values
    # The last norm leaves vectors of length sqrt(hidden), so this gives logits a standard deviation of 2.
    is_vocabulary = "embed_tokens" in name or "lm_head" in name
    return values * (2.0 if is_vocabulary else 1.0) / shape[1] ** 0.5


def _text() -> Iterator[str]:
    yield Path(__file__).read_text(encoding="utf-8")
    yield from (module.__doc__ or "" for module in (json, torch, Tokenizer))
