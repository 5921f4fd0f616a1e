# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of SPP next to other methods. Run the modules from the repository root; see README.md here."""
