"""Sizes of the buffers that the engine works in, shared with the planner. No torch here."""

# Logits of this many bytes, were they in fp32, exist at a time: so many that the product does not
# notice. On a CPU more rows make it no faster; wide accelerators want more.
LOSS_CHUNK_BYTES = {"cpu": 2**25}
LOSS_CHUNK_BYTES_ELSEWHERE = 2**26
# Products of whole multiples of so many rows waste the least.
LOSS_CHUNK_ROWS = 32
# A CPU's products are up to a third slower where the number of rows is no multiple of this.
PRODUCT_ROWS = {"cpu": 4}
# Elements of a block of rows: on a CPU what fits its caches, elsewhere what keeps buffers small.
BLOCK_ELEMENTS = {"cpu": 2**18}
BLOCK_ELEMENTS_ELSEWHERE = 2**23
# A widened weight keeps its rows aligned: further columns come in multiples of this.
FURTHER_COLUMNS = 16
# Queries whose scores exist at a time, where attention is computed in blocks.
QUERIES_PER_BLOCK = 256


def loss_chunk_rows(vocab_size: int, device: str) -> int:
    """So many rows of logits exist at a time, on a kind of device (cpu, cuda, mps)."""
    rows = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES_ELSEWHERE) // (4 * vocab_size)
    return max(1, rows - rows % LOSS_CHUNK_ROWS if rows > LOSS_CHUNK_ROWS else rows)


def filler_tokens(tokens: int, device: str) -> int:
    """Tokens that a micro-batch is filled up with, so that its products have handy sizes.

    One less than a handy number of rows at least: so many may be missing to the trained positions.
    """
    multiple = PRODUCT_ROWS.get(device, 1)
    least = multiple - 1
    return least + -(tokens + least) % multiple


def filled_rows(rows: int, device: str) -> int:
    """So many rows of trained positions, filled up to a handy number."""
    return rows + -rows % PRODUCT_ROWS.get(device, 1)


def block_rows(width: int, device: str) -> int:
    """Rows of `width` elements in a block, on a kind of device (cpu, cuda, mps)."""
    return max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS_ELSEWHERE) // width)


def further_columns(total_rank: int) -> int:
    """The columns that adapters of so many ranks together add to a layer's weight."""
    return -(-total_rank // FURTHER_COLUMNS) * FURTHER_COLUMNS
