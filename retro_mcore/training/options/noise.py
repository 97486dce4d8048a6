"""Flags of neighbor noise; see `samples/neighbor_noise.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from retro_mcore.errors import ConfigurationError, RetroError, flag_of, raise_problems


@dataclass(kw_only=True)
class NeighborNoiseOptions:
    """Neighbor noise, in training only, so that the model does not rely on retrieval alone."""

    retro_drop_chunks: float = 0.0
    """Probability that a chunk loses all its neighbors."""
    retro_drop_neighbors: float = 0.0
    """Probability that a neighbor is dropped."""
    retro_replace_neighbors: float = 0.0
    """Probability that a neighbor is replaced by a random chunk of the database."""
    retro_replace_tokens: float = 0.0
    """Probability that a retrieved token is replaced by another token of the sample's neighbors."""

    def check_neighbor_noise(self, no_retrieval: bool) -> None:
        """Reject probabilities outside 0 to 1, and noise without neighbors.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
            SeveralErrors: several options are invalid. Names all of them.
        """
        problems: list[RetroError] = []
        for field in fields(NeighborNoiseOptions):
            flag, value = flag_of(field.name), getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                problems.append(ConfigurationError(flag, f"{value}", "Choose from 0 to 1"))
            elif value and no_retrieval:
                problems.append(
                    ConfigurationError(flag, "given with --no-retrieval", "Leave one of them out")
                )
        raise_problems(problems)
