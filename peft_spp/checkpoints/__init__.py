# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and adapters as folders of files: reading them tensor by tensor, and replacing them as a whole."""
