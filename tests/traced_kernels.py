"""Compiles attention of decode steps, and fails where a graph breaks or is compiled again.

A process of its own, since the type checks that tests put on every function cannot be compiled.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcompress import kernels
from kvcompress.kernels.codes import codes_op
from kvcompress.kernels.ragged import decode_op


def main() -> None:
    """Eager and compiled agree, for lengths that change, in one graph each."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    query, keys, values = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    data, scale = torch.randint(0, 256, (2, 2, 64, 8), dtype=torch.uint8), torch.rand(2, 2, 64, 2)
    coded = (data, scale, scale, data, scale, scale, keys, values, 0.25)

    def lengths(step: int) -> torch.Tensor:
        return torch.tensor([[step], [step + 9]])

    functions = {
        "decode_attention": lambda step: kernels.decode_attention(query, keys, values, 0.25, step),
        "decode_op": lambda step: decode_op(query, keys, values, 0.25, step, None, 0),
        "decode_attention_codes": lambda step: kernels.decode_attention_codes(query, *coded, 2 * step, step),
        "codes_op": lambda step: codes_op(query, *coded, 2 * step, step, None, None),
    }
    for name, function in functions.items():
        graphs.clear()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for step in range(4):
            torch.testing.assert_close(compiled(lengths(step)), function(lengths(step)))
        assert len(graphs) == 1, f"{name}: {len(graphs)} graphs"
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_op, (query, keys, values, 0.25, lengths(3), None, 0), test_utils=checks)
    torch.library.opcheck(codes_op, (query, *coded, lengths(3), lengths(2), None, None), test_utils=checks)


if __name__ == "__main__":
    main()
