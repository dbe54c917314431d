"""How a wrong setting is refused: its name, the rule, the value, the remedy."""


class ConfigError(ValueError):
    """A setting that cannot be."""


def require(holds: bool, name: str, rule: str, value: object, remedy: str | None = None) -> None:
    """Raise `ConfigError` "NAME must RULE, got VALUE; REMEDY" unless `holds`."""
    if not holds:
        got = value if isinstance(value, (int, float, type(None))) else f"'{value}'"
        raise ConfigError(f"{name} must {rule}, got {got}" + (f"; {remedy}" if remedy else ""))
