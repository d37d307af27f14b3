"""Configuration of the worker service."""

from dataclasses import dataclass

from albireo.config import flag
from albireo.security import SecurityFlags
from albireo.tracing import OtlpFlags
from worker_svc.stub.roofline import DEVICES, MODELS


@dataclass(frozen=True)
class WorkerConfig(SecurityFlags, OtlpFlags):
    """Flags of ``python -m worker_svc``: one worker group on this host."""

    model: str = flag("demo", "model directory, Hub id, or 'demo'")
    engine: str = flag("torch", "what runs the model", choices=("torch", "stub"))
    tp: int = flag(0, "ranks of the group (tensor parallelism); 0: 2 on a CPU where that is possible, else 1")
    device: str = flag("auto", "auto takes an NVIDIA GPU where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto takes the checkpoint's", choices=("auto", "float32", "bfloat16"))
    quantize: str = flag(
        "none", "w8a8: weights and activations of linear layers in 8 bits, on a CPU", choices=("none", "w8a8")
    )
    eager: bool = flag(False, "on a CPU, run the model op by op in torch, not as compiled kernels; slow")
    sampler: str = flag(
        "merge",
        "how ranks sample; merge: each its own part of the vocabulary, so that logits stay where they are",
        choices=("merge", "batch-sharded", "gather"),
    )
    max_num_seqs: int = flag(0, "sequences that run at once; 0: 64 on a CPU, 256 on a GPU")
    max_model_len: int = flag(0, "longest sequence, tokens; 0: the model's")
    max_num_batched_tokens: int = flag(0, "tokens of one step; 0: 512 on a CPU, 4096 on a GPU")
    kv_cache_gib: float = flag(0.0, "KV cache of each rank, GiB; 0: what all sequences need, within the memory")
    kv_store: str = flag(
        "", "KV store: unix:path of its arena's socket, or its host:port if that is another host; empty: none"
    )
    listen: str = flag("127.0.0.1:50052", "address of the group's leader: host:port or unix:path")
    run_dir: str = flag("", "directory for sockets and logs of this group; default: a temporary one")
    metrics_port: int = flag(0, "Prometheus metrics of the leader on this port of 127.0.0.1; 0: none")
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    stub_mode: str = flag(
        "truth",
        "truth: the stub engine's tokens prove the plans right; clock: it only takes time, for measuring hosts",
        choices=("truth", "clock"),
    )
    stub_step_ms: float = flag(0.0, "how long a step of the stub engine lasts (modelled)")
    stub_device: str = flag(
        "none", "a step of the stub engine lasts as long as on this device (modelled)", choices=("none", *DEVICES)
    )
    stub_model: str = flag("none", "... with a model of this size", choices=("none", *MODELS))
    step_timeout: float = flag(
        60.0, "seconds after which a step that has not completed is taken for stuck; the rank then restarts"
    )
    rank: int = flag(-1, "run this rank only; -1: start all ranks of the group and watch them")

    def __post_init__(self) -> None:
        if self.tp < 0:
            raise ValueError(f"--tp {self.tp}: must not be negative")
        if self.step_timeout <= 0:
            raise ValueError(f"--step-timeout {self.step_timeout:g}: more than 0")
