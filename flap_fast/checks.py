"""Checks of settings; errors give the name, the rule, the value and the remedy."""


class ConfigError(ValueError):
    """An invalid setting."""


def require(holds: bool, name: str, rule: str, value: object, remedy: str | None = None) -> None:
    """Raise `ConfigError` "NAME must RULE, got VALUE; REMEDY" unless `holds`."""
    if not holds:
        got = value if isinstance(value, (int, float, type(None))) else f"'{value}'"
        raise ConfigError(f"{name} must {rule}, got {got}" + (f"; {remedy}" if remedy else ""))
