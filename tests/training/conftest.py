# SPDX-License-Identifier: Apache-2.0
from helpers.one_thread import one_thread as one_thread
