"""What is read from a model directory, what is refused, and how the vocabulary is split."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import ConfigError
from albireo.model_spec import DEMO_MODEL, RopeSpec, load_model_spec, resolve_model, shard_vocab

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def write(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model directory; a value of None removes the key."""
    path.mkdir(exist_ok=True)
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_llama(model: Path) -> None:
    spec = load_model_spec(model)
    assert (spec.name, spec.architecture, spec.model_type) == ("model", "LlamaForCausalLM", "llama")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 8)
    assert spec.rope == RopeSpec(10000.0)
    assert not any((spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm, spec.tie_word_embeddings))
    assert (spec.dtype, spec.eos_token_ids, spec.bos_token_id, spec.sliding_window) == ("float32", (2,), 1, None)


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"),
    [("Qwen2ForCausalLM", True, False), ("Qwen3ForCausalLM", False, True), ("MistralForCausalLM", False, False)],
)
def test_what_the_family_implies(tmp_path: Path, architecture: str, qkv_bias: bool, qk_norm: bool) -> None:
    spec = load_model_spec(write(tmp_path, architectures=[architecture], head_dim=32))
    assert (spec.qkv_bias, spec.output_bias, spec.qk_norm, spec.head_dim) == (qkv_bias, False, qk_norm, 32)


def test_sliding_windows(tmp_path: Path) -> None:
    """Mistral's is served; Qwen writes one that counts only where it says so; Llama has none."""
    mistral = write(tmp_path / "a", architectures=["MistralForCausalLM"], sliding_window=128)
    assert load_model_spec(mistral).sliding_window == 128
    qwen = write(tmp_path / "b", architectures=["Qwen2ForCausalLM"], sliding_window=128, use_sliding_window=False)
    assert load_model_spec(qwen).sliding_window is None
    write(qwen, architectures=["Qwen2ForCausalLM"], sliding_window=128, use_sliding_window=True)
    with pytest.raises(ConfigError, match="use_sliding_window"):
        load_model_spec(qwen)


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, RopeSpec(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(5e5, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}}, RopeSpec(5e5, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}}, RopeSpec(5e5, "llama3", 8.0)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}}, RopeSpec(5e5, "llama3", 8.0)),
    ],
)
def test_rope_of_old_and_new_transformers(tmp_path: Path, changes: dict[str, Any], rope: RopeSpec) -> None:
    assert load_model_spec(write(tmp_path, **changes)).rope == rope


@pytest.mark.parametrize(
    ("changes", "generation", "ids"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": [2, 5]}, None, (2, 5)),
        ({"eos_token_id": None}, None, ()),
        ({}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {"temperature": 0.5}, (2,)),
    ],
)
def test_end_of_sequence_ids(
    tmp_path: Path, changes: dict[str, Any], generation: dict[str, Any] | None, ids: tuple[int, ...]
) -> None:
    """Those of generation_config.json, which chat models extend, before those of config.json."""
    assert load_model_spec(write(tmp_path, generation, **changes)).eos_token_ids == ids


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_old_and_new_transformers(tmp_path: Path, key: str) -> None:
    assert load_model_spec(write(tmp_path, None, **{key: "bfloat16"})).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not served; served are LlamaForCausalLM"),
        ({"architectures": None}, "is not served"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "low_freq_factor is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_what_is_not_served(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_model_spec(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "No such file"), ("{", "not JSON"), ("[]", "not a JSON object")]
)
def test_unreadable_configs(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json: {complaint}"):
        load_model_spec(tmp_path)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tp_that_fits(model: Path, tp: int) -> None:
    load_model_spec(model).check_tp(tp)


@pytest.mark.parametrize(
    ("changes", "tp", "complaint"),
    [
        ({}, 3, "--tp 3: 8 attention heads"),
        ({"intermediate_size": 94}, 4, "--tp 4: 94 intermediate size"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            "--tp 4: neither multiple nor divisor of 6 KV heads",
        ),
    ],
)
def test_tp_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], tp: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_model_spec(write(tmp_path, **changes)).check_tp(tp)


def test_resolve_local(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("demo") == DEMO_MODEL
    assert resolve_model(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert resolve_model("model") == model


@pytest.mark.parametrize("name", ["/no/such/dir", "./model", "~/model", "model", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such directory, not a Hub id"):
        resolve_model(name)


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nat all"), OfflineModeIsEnabled("offline"), OSError("no route")]
)
def test_a_hub_that_does_not_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"'owner/name'.* the Hub did not give it") as info:
        resolve_model("owner/name")
    assert "\n" not in str(info.value)


vocab_sizes = st.integers(1, 300_000)
tp_sizes = st.integers(1, 64)


@given(vocab_sizes, tp_sizes)
def test_shards_cover_the_vocabulary_in_order(vocab_size: int, tp_size: int) -> None:
    shards = [shard_vocab(vocab_size, rank, tp_size) for rank in range(tp_size)]
    assert shards[0].start == 0
    assert shards[-1].stop == vocab_size
    assert all(left.stop == right.start for left, right in pairwise(shards))
    assert all(len(shard) <= len(shards[0]) for shard in shards), "the first is the widest"


@given(vocab_sizes, tp_sizes)
def test_shards_end_on_edges_of_the_same_tiles(vocab_size: int, tp_size: int) -> None:
    """Whatever the TP size: sums over tiles must not depend on it."""
    tiles = [2**power for power in range(11) if 2**power == 1 or -(-vocab_size // 2**power) >= 64]
    for rank in range(tp_size):
        stop = shard_vocab(vocab_size, rank, tp_size).stop
        assert stop == vocab_size or stop % tiles[-1] == 0


@given(vocab_sizes)
def test_one_rank_has_it_all(vocab_size: int) -> None:
    assert shard_vocab(vocab_size, 0, 1) == range(vocab_size)


def test_shards_are_balanced_for_usual_sizes() -> None:
    for vocab_size in (4096, 32_000, 128_256, 151_936):
        for tp_size in (2, 4, 8):
            sizes = [len(shard_vocab(vocab_size, rank, tp_size)) for rank in range(tp_size)]
            assert max(sizes) - min(sizes) <= vocab_size / 16
