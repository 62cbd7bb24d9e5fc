"""Named configurations: the methods of the field, each in a few lines."""

from __future__ import annotations

from typing import Any

_ONE = {"fraction": 0.2, "sink": 1, "recent": 1}  # the protection of PrefixKV's scripts
_PREFIX = {"name": "prefix", "protected": "on_top"}  # as its released code counts them
_TEXT = {"fraction": 0.2, "sink": 4, "recent": 32}
_LAST_16 = {"name": "snapkv", "window": 16}
_RUNS = {"name": "chunk", "length": 12, "granularity": "head", "decode": "oldest"}

# name -> (what it is, fields)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": (
        "Chosen for the first prompt: `image` where it shows one, `text` where it does not, and at most 128 tokens are "
        "kept whole. The report says what was chosen, and why.",
        {"auto": True},
    ),
    "full": (
        "Keeps everything: the reference that compression is compared with.",
        {"budget": 1.0, "evictor": None},
    ),
    "prefixkv": (
        "PrefixKV (arXiv 2412.03409): layer sizes from one threshold on summed attention, fixed-point decoding.",
        {"budget": _ONE, "scorer": "attention", "allocator": _PREFIX},
    ),
    "prefixkv+merge": (
        "PrefixKV (arXiv 2412.03409) whose evicted tokens are averaged into the most similar kept ones (LOOK-M, arXiv "
        "2406.18139); a combination of ours.",
        {"budget": _ONE, "scorer": "attention", "allocator": _PREFIX, "merger": "lookm"},
    ),
    "prefixkv+int4": (
        "PrefixKV (arXiv 2412.03409) stored in four bits as in KIVI (arXiv 2402.02750); a combination of ours.",
        {"budget": _ONE, "scorer": "attention", "allocator": _PREFIX, "quantizer": "quanto4"},
    ),
    "uniform": (
        "The baseline of PrefixKV: the same scores and rules, every layer the same size.",
        {"budget": _ONE, "scorer": "attention", "allocator": "uniform"},
    ),
    "h2o": (
        "H2O (arXiv 2306.14048): summed attention per head, the lowest leaves. Deviates: 64 recents instead of half of "
        "the budget; scores are those of scoring forwards.",
        {
            "budget": {"fraction": 0.2, "sink": 0, "recent": 64},
            "scorer": "attention",
            "evictor": {"name": "topk", "granularity": "head", "decode": "lowest_score"},
        },
    ),
    "elastic": (
        "Elastic Cache (arXiv 2407.18121): summed attention, evicted tokens averaged into the nearest kept position, "
        "fixed-point decoding.",
        {"budget": _ONE, "scorer": "attention", "allocator": "uniform", "merger": "nearest"},
    ),
    "snapkv": (
        "SnapKV (arXiv 2404.14469): pooled attention of the last 32 queries, per head. Deviates: decoding stays within "
        "the budget, the oldest after four sinks leave.",
        {
            "budget": {"fraction": 0.2, "sink": 4, "recent": 1},
            "scorer": "snapkv",
            "evictor": {"name": "topk", "granularity": "head", "decode": "oldest"},
        },
    ),
    "pyramidkv": (
        "PyramidKV (arXiv 2406.02069): SnapKV's scores, wide lower and narrow upper layers. Deviates as snapkv does.",
        {
            "budget": {"fraction": 0.2, "sink": 4, "recent": 1},
            "scorer": "snapkv",
            "allocator": "pyramid",
            "evictor": {"name": "topk", "granularity": "head", "decode": "oldest"},
        },
    ),
    "vlcache": (
        "VL-Cache (arXiv 2410.23317): attention of the queries after the image, layer sizes by sparsity. Deviates: "
        "fixed-point decoding.",
        {
            "budget": {"fraction": 0.2, "sink": 1, "recent": 16},
            "scorer": {"name": "attention", "queries": "post_vision"},
            "allocator": "sparsity",
        },
    ),
    "lookm": (
        "LOOK-M (arXiv 2406.18139): text before images, evicted tokens merged into the most similar kept ones by "
        "midpoints, per head. Deviates: text outweighs images a thousandfold instead of always; 16 recents instead of "
        "a share of the budget; what decoding evicts leaves by age, unmerged.",
        {
            "budget": {"fraction": 0.2, "sink": 1, "recent": 16},
            "scorer": {"name": "attention", "text_weight": 1000.0},
            "evictor": {"name": "topk", "granularity": "head"},
            "merger": {"name": "lookm", "rule": "pivotal", "within_modality": False},
        },
    ),
    "cake": (
        "CAKE (arXiv 2503.12491): layer sizes by entropy and variance of the window's attention, the window on top. "
        "Deviates: SnapKV's scores; four sinks are kept with the window; decoding as in snapkv.",
        {
            "budget": {"fraction": 0.2, "sink": 4, "recent": 1},
            "scorer": "snapkv",
            "allocator": {"name": "entropy", "protected": "on_top"},
            "evictor": {"name": "topk", "granularity": "head", "decode": "oldest"},
        },
    ),
    "tova": (
        "TOVA (arXiv 2401.06104): the lowest attention of the last query leaves. Deviates: scores are those of scoring "
        "forwards, not of every decode step.",
        {
            "budget": {"fraction": 0.2, "sink": 0, "recent": 1},
            "scorer": "tova",
            "evictor": {"name": "topk", "decode": "lowest_score"},
        },
    ),
    "rkv": (
        "R-KV (arXiv 2505.24133): for long answers; after every 128 generated tokens the attention of the last 8, less "
        "what keys have in common, decides anew, per head. Deviates: the prompt is cut too; layers hold up to 128 "
        "tokens more than the budget in between.",
        {
            "budget": {"fraction": 0.2, "sink": 0, "recent": 1},
            "scorer": "rkv",
            "evictor": {"name": "every", "granularity": "head"},
        },
    ),
    "streaming": (
        "StreamingLLM (arXiv 2309.17453): four sinks and the most recent tokens.",
        {"budget": {"fraction": 0.2, "sink": 4, "recent": 1}, "allocator": "uniform", "evictor": "streaming"},
    ),
    "kivi4": (
        "KIVI (arXiv 2402.02750) in four bits: every token is kept, keys quantized per channel, values per token.",
        {"budget": 1.0, "evictor": None, "quantizer": "quanto4"},
    ),
    "lightkv": (
        "LightKV (arXiv 2605.00789): image tokens merged during prefill, everything kept that later layers get.",
        {"budget": 1.0, "evictor": None, "reducer": "lightkv"},
    ),
    "fastv": (
        "FastV (arXiv 2403.06764): half of the image tokens dropped after two layers.",
        {"budget": 1.0, "evictor": None, "reducer": "fastv"},
    ),
    "pyramiddrop": (
        "PyramidDrop (arXiv 2410.17247): half of the image tokens dropped after each quarter of the depth, the others "
        "numbered anew in every layer.",
        {"budget": 1.0, "evictor": None, "reducer": {"name": "pyramiddrop", "positions": "per_layer"}},
    ),
    "visionzip": (
        "VisionZip (arXiv 2412.04467): a ninth of the image tokens, most of them those that the vision tower looks at, "
        "the others merged into the rest before the first layer. Deviates: merged after the projector; positions stay.",
        {"budget": 1.0, "evictor": None, "reducer": "visionzip"},
    ),
    "prefixkv+lightkv": (
        "PrefixKV (arXiv 2412.03409) on image tokens that LightKV (arXiv 2605.00789) merged; a combination of ours.",
        {"budget": _ONE, "scorer": "attention", "allocator": _PREFIX, "reducer": "lightkv"},
    ),
    "headprefix": (
        "PrefixKV's one threshold (arXiv 2412.03409) over all heads of all layers, each with its own tokens; a "
        "combination of ours.",
        {"budget": _ONE, "scorer": "attention", "allocator": {"name": "headprefix", "protected": "on_top"}},
    ),
    "headprefix+int4": (
        "The same stored in four bits as in KIVI (arXiv 2402.02750), each head in as many groups as it has; a "
        "combination of ours.",
        {
            "budget": _ONE,
            "scorer": "attention",
            "allocator": {"name": "headprefix", "protected": "on_top"},
            "quantizer": "quanto4",
        },
    ),
    "adakv": (
        "AdaKV (arXiv 2407.11550): heads of a layer share its slots by one ranking; attention of all queries. "
        "Deviates: the paper's scores are those of ada-snapkv.",
        {"budget": _ONE, "scorer": "attention", "allocator": "adakv"},
    ),
    "ada-snapkv": (
        "AdaKV on SnapKV (arXiv 2407.11550, its Ada-SnapKV): heads share a layer by the attention of the last window. "
        "Deviates: four sinks are kept too; decoding as in snapkv.",
        {
            "budget": {"fraction": 0.2, "sink": 4, "recent": 1},
            "scorer": "snapkv",
            "allocator": "adakv",
            "evictor": {"name": "topk", "decode": "oldest"},
        },
    ),
    "ada-expected": (
        "AdaKV (arXiv 2407.11550) on expected attention (kvpress), which sees no question. Deviates: four sinks are "
        "kept too; decoding as in snapkv.",
        {
            "budget": {"fraction": 0.2, "sink": 4, "recent": 1},
            "scorer": "expected_attention",
            "allocator": "adakv",
            "evictor": {"name": "topk", "decode": "oldest"},
        },
    ),
    "kvzip": (
        "KVzip (arXiv 2505.23416): what repeating the prompt looks at, in one ranking over heads of all layers; for "
        "`Document` and `score_by_reconstruction`, so that no question is needed. Deviates: four sinks and 32 recents "
        "are kept too; decoding as in snapkv.",
        {
            "budget": {"fraction": 0.3, "sink": 4, "recent": 32},
            "scorer": "kvzip",
            "allocator": "scores",
            "evictor": {"name": "topk", "decode": "oldest"},
        },
    ),
    "prefixkv-text": (
        "PrefixKV's threshold (arXiv 2412.03409) over half of the slots, the other half given evenly, on the scores "
        "and with the runs of `text`: a combination of ours.",
        {"budget": _TEXT, "scorer": _LAST_16, "allocator": {**_PREFIX, "even": 0.5}, "evictor": _RUNS},
    ),
    "text": (
        "Made for plain text: SnapKV's scores (arXiv 2404.14469) from the last 16 queries in place of 32, and for each "
        "head the best runs of 12 neighbouring tokens (ChunkKV, arXiv 2502.00299), so that what follows a token which "
        "is looked at stays with it; best on long text in our own measurement (see Layers, heads and questions).",
        {"budget": _TEXT, "scorer": _LAST_16, "evictor": _RUNS},
    ),
    "image": (
        "Made for images: SnapKV's scores (arXiv 2404.14469) from the last 8 queries in place of 32, next to nothing "
        "else protected, and evicted tokens merged into the most similar kept ones (LOOK-M, arXiv 2406.18139), each by "
        "its mass, so that drawn scenes gain and text in images loses little (see Layers, heads and questions).",
        {
            "budget": {"fraction": 0.2, "sink": 1, "recent": 1},
            "scorer": {"name": "snapkv", "window": 8},
            "evictor": {"name": "topk", "granularity": "head", "decode": "oldest"},
            "merger": {"name": "lookm", "rule": "mass"},
        },
    ),
}
