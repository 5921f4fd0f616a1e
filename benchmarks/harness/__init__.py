# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: interleaved timing, statistics, results as JSON, tables, pictures, options."""

from .environment import describe_environment
from .results import BenchmarkResult, Case, result_path
from .statistics import Summary, ratio_summary, summarize
from .tables import format_bytes, format_ratio, format_seconds, make_console, print_table
from .timing import (
    Contestant,
    Rounds,
    contestants_that_fit,
    measure_cpu_time,
    measure_interleaved,
    repeated,
    repetitions_for,
    time_call,
)


__all__ = [
    "BenchmarkResult",
    "Case",
    "Contestant",
    "Rounds",
    "Summary",
    "contestants_that_fit",
    "describe_environment",
    "format_bytes",
    "format_ratio",
    "format_seconds",
    "make_console",
    "measure_cpu_time",
    "measure_interleaved",
    "print_table",
    "ratio_summary",
    "repeated",
    "repetitions_for",
    "result_path",
    "summarize",
    "time_call",
]
