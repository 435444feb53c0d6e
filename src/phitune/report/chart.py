"""A histogram as inline SVG, in the colours of the page it stands in."""

from phitune.report.statistics import Histogram

_WIDTH, _HEIGHT, _AXIS = 640, 150, 24


def chart(histogram: Histogram, max_length: int | None) -> str:
    """Bars with their figures as tooltips, the scale below, and max_length if it is in sight."""
    counts = [*histogram.counts, *([histogram.beyond] if histogram.beyond else [])]
    step = _WIDTH / len(counts)
    most = max(counts)
    parts = []
    for index, count in enumerate(counts):
        first = index * histogram.width
        beyond = index == len(histogram.counts)
        label = f"{first:,} or more" if beyond else f"{first:,} to {first + histogram.width - 1:,}"
        height = max(1.0, (_HEIGHT - 18) * count / most) if count else 0.0
        far = " far" if max_length is not None and first > max_length else ""
        x, y = index * step, _HEIGHT - height
        parts.append(
            f'<rect class="bar{far}" x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}"'
            f' height="{height:.1f}"><title>{label} tokens: {count:,} rows</title></rect>'
        )
        if count:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count:,}'
                "</text>"
            )
        anchor = "start" if index == 0 else "middle"
        mark = f"{first:,}+" if beyond else f"{first:,}"
        parts.append(
            f'<text x="{x if index == 0 else x + 1:.1f}" y="{_HEIGHT + 15}"'
            f' text-anchor="{anchor}">{mark}</text>'
        )
    if max_length is not None and max_length < histogram.end:
        x = max_length / histogram.width * step
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="10">max_length {max_length:,}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _AXIS}" role="img"'
        ' aria-label="histogram"><line class="axis"'
        f' x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>' + "".join(parts) + "</svg>"
    )
