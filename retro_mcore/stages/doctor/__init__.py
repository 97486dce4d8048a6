"""Checks of a node, or of all ranks of a job, before a long run."""

from retro_mcore.stages.doctor.checkup import DoctorConfig, run
from retro_mcore.stages.doctor.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "DoctorConfig", "Finding", "run"]
