"""Settings of the gate's rollout: `TRUEUP_GATE__DEFAULT_MODE`, or [gate] in trueup.toml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# enforce: what is denied does not run. observe: it is noted, and runs. off: it runs.
GateMode = Literal["enforce", "observe", "off"]


class GateSettings(BaseModel):
    """How strict the gate is, by feature. What `trueup rollout set` says at run time goes before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_mode: GateMode = Field(default="enforce", description="enforce, observe or off, for features not named")
    modes: dict[str, GateMode] = Field(
        default_factory=dict, description='enforce, observe or off, by feature name; "*": every other'
    )

    def mode_of(self, feature_name: str) -> GateMode:
        """Return a feature's own mode, that of "*" (every other feature, as at run time), or the default."""
        return self.modes.get(feature_name, self.modes.get("*", self.default_mode))
