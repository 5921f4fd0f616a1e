# SPDX-License-Identifier: Apache-2.0
"""What several tests share: tiny models, plain references, and cases."""
