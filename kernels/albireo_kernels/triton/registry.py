"""Every kernel with the types of its arguments, for compilation without a GPU."""

from typing import Any, NamedTuple

from albireo_kernels.triton import candidates, draw, edits, filters, logprobs

FLOAT32, FLOAT64, INT32, INT64 = "*fp32", "*fp64", "*i32", "*i64"
INT = "i32"
TYPES = {
    **dict.fromkeys(
        ("logits", "temperature", "scores", "part_scores", "largest", "values", "maxima", "biases"), FLOAT32
    ),
    **dict.fromkeys(("repetition", "frequency", "presence"), FLOAT32),
    **dict.fromkeys(("top_p", "log_min_p"), FLOAT64),
    **dict.fromkeys(
        ("top_k", "k0", "k1", "ids", "part_ids", "num_wanted", "settled", "bias_starts", "bias_ids"), INT32
    ),
    **dict.fromkeys(("bad_starts", "bad_ids", "allowed_rows", "allowed_bits", "count_rows", "counts"), INT32),
    **dict.fromkeys(("cuts", "keys", "all_keys", "floors", "prefixes", "targets", "bins", "tokens", "sums"), INT64),
    **dict.fromkeys(("numbers",), INT64),
    **dict.fromkeys(("stride", "count_stride", "width", "first_id", "num_tiles", "num_parts", "num_ranks"), INT),
    **dict.fromkeys(("num_rows", "num_keys", "num_words", "num_digits", "shift"), INT),
}
"""Of the arguments, by name: a name means the same everywhere."""


class Variant(NamedTuple):
    """A kernel as it is launched."""

    kernel: Any
    num_warps: int
    constants: dict[str, Any]


VARIANTS = (
    Variant(edits.edit_kernel, 4, {"TILE": edits.TILE, "LIST": 128}),
    Variant(edits.count_kernel, 1, {}),
    Variant(draw.best_kernel, 4, {"NOISE": True, "CUT": True, "TILE": draw.TILE}),
    Variant(draw.best_of_parts_kernel, 1, {"PARTS": 128}),
    Variant(draw.merge_and_draw_kernel, 2, {"RANKS": 8, "K": 64}),
    Variant(candidates.select_values_kernel, 8, {"K": 256, "CHUNK": candidates.CHUNK}),
    Variant(candidates.select_keys_kernel, 8, {"K": 256, "CHUNK": candidates.CHUNK}),
    Variant(candidates.sort_keys_kernel, 8, {"RANKS": 8, "K": 32}),
    Variant(filters.min_p_kernel, 1, {}),
    Variant(filters.histogram_kernel, 4, {"MASS": True, "NUM_BINS": filters.NUM_BINS, "TILE": filters.TILE}),
    Variant(filters.narrow_kernel, 4, {"MASS": True, "NUM_BINS": filters.NUM_BINS}),
    Variant(logprobs.tile_sums_kernel, 4, {"TILE": 1024, "TILES": 2}),
    Variant(logprobs.token_logits_kernel, 1, {}),
    Variant(logprobs.count_before_kernel, 4, {"TILE": 1024}),
)
