"""The resident teacher: load it, score given tokens with it, let it generate, keep its answers on disk.

Other rooms call `TeacherService` and nothing else; what crosses is numpy, bytes and plain numbers.
"""

from __future__ import annotations

from opd_daemon import blas

blas.preload_with_mlx()

from opd_daemon.teacher.service import TeacherService

__all__ = ["TeacherService"]
