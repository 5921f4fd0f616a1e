# SPDX-License-Identifier: Apache-2.0
"""Compiled code: the C++ sources, the loader that compiles them on first use, and the passes over masks."""
