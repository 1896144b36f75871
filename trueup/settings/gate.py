"""Settings of the gate's rollout: `TRUEUP_GATE__DEFAULT_MODE`, or [gate] in trueup.toml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# enforce: a denied task does not run. observe: it runs and the denial is recorded. off: it runs.
GateMode = Literal["enforce", "observe", "off"]


class GateSettings(BaseModel):
    """How strict the gate is, by feature. A mode set with `trueup rollout set` overrides these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_mode: GateMode = Field(default="enforce", description="enforce, observe or off, for all other features")
    modes: dict[str, GateMode] = Field(default_factory=dict, description='the mode by feature name; "*": all others')

    def mode_of(self, feature_name: str) -> GateMode:
        """Return the mode of the feature, else the mode of "*", else the default."""
        return self.modes.get(feature_name, self.modes.get("*", self.default_mode))
