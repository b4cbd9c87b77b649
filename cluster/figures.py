"""Numbers for people: counts, bytes, time spans."""


def count(value: float) -> str:
    """Return a number with three digits and a suffix: 950, 12.3k, 4.56M."""
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            scaled = value / divisor
            return f"{scaled:.3g}{suffix}" if abs(scaled) < 100 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Return bytes: 812 B, 4.2 MB."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= limit:
            return f"{num_bytes / limit:.3g} {suffix}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time span: 8.2 s, 95 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
