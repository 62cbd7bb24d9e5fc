"""What measures the figures of docs/benchmarks.md; it stays with the sources and is no part of the package."""
