# SPDX-License-Identifier: Apache-2.0
from one_thread import one_thread as one_thread
