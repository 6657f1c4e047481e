"""A key-value cache whose memory is taken once: written in place, read as views, rows moved instead of copied."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Columns:
    """Which columns of a cache are in use; shared by its layers, which all see the same ones during a forward pass.

    Attributes:
        capacity: columns that there is memory for.
        low, end: the columns ``low .. end`` are visible; the next tokens are written from ``end`` on.
    """

    def __init__(self, capacity: int, end: int = 0) -> None:
        """Start with nothing visible; the first tokens are written at column ``end``."""
        self.capacity, self.low, self.end = capacity, end, end

    @property
    def visible(self) -> int:
        """How many columns attention can see."""
        return self.end - self.low


class BlockCache(CacheLayerMixin):
    """One block's keys and values, ``[rows, heads, capacity, head_dim]``; allocated at the first write, for ``rows`` rows or as many as it gets."""

    is_sliding = False
    is_croppable = False

    def __init__(self, columns: Columns, rows: int | None = None, base: int = 0) -> None:
        """Prepare a layer.

        Args:
            columns: the columns in use, shared with the other layers.
            rows: rows to take memory for; None takes as many as the first keys have.
            base: columns before this one are kept elsewhere (:class:`steered_lm.engine.attention.SharedPrompts`).
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns, self.rows, self.base = columns, rows, base

    @property
    def visible(self) -> slice:
        """Where the visible columns are in memory."""
        return slice(max(self.columns.low - self.base, 0), max(self.columns.end - self.base, 0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        rows = key_states.shape[0] if self.rows is None else self.rows
        for name, states in (("keys", key_states), ("values", value_states)):
            # zeros, since attention multiplies even masked values: a NaN left in memory would reach every row
            setattr(self, name, states.new_zeros(rows, states.shape[1], self.columns.capacity - self.base, states.shape[3]))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Float[Tensor, "rows heads width k"], value_states: Float[Tensor, "rows heads width v"], *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the visible columns and return all that the pass can see, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, visible = key_states.shape[0], self.visible
        end = visible.stop + key_states.shape[2]
        seen = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            assert held is not None
            held[:rows, :, visible.stop : end] = states
            seen.append(held[:rows, :, visible.start : end])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a pass over ``query_length`` tokens sees, and the first one's index."""
        return self.columns.visible + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of visible columns."""
        return self.columns.visible

    def get_max_length(self) -> int:
        """Return -1: the engine takes care of the capacity."""
        return -1

    def pairs(self, other: "BlockCache") -> list[tuple[Tensor, Tensor]]:
        """Return (own, other's) keys and values; memory is taken now if there is none yet."""
        assert other.keys is not None, "nothing to copy from"
        assert other.values is not None, "nothing to copy from"
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
        assert self.keys is not None, "memory was taken"
        assert self.values is not None, "memory was taken"
        return [(self.keys, other.keys), (self.values, other.values)]


class EngineCache(Cache):
    """The blocks' caches, and the operations that the engine needs beside attention's own ``update``."""

    def __init__(self, blocks: int, capacity: int, *, rows: int | None = None, end: int = 0, without: int = 0) -> None:
        """Prepare a cache.

        Args:
            blocks: number of layers.
            capacity: number of columns.
            rows: rows to take memory for; None takes as many as the first keys have.
            end: the first column to be written.
            without: so many layers, from the first on, do not hold the columns before ``end``.
        """
        self.columns = Columns(capacity, end)
        self.block_caches = [BlockCache(self.columns, rows, end if block < without else 0) for block in range(blocks)]
        super().__init__(layers=list(self.block_caches))

    def advance(self, width: int) -> None:
        """Make the columns of the pass that has just ended visible to the next."""
        self.columns.end += width

    def branched(self, indices: Sequence[Int[Tensor, " chosen"]], capacity: int) -> "EngineCache":
        """Return a new cache of ``capacity`` columns whose rows are, block by block, the rows ``indices`` of this one; this one stays as it is."""
        new = EngineCache(len(self.block_caches), capacity)
        new.columns.low, new.columns.end = self.columns.low, self.columns.end
        for own_block, other_block, index in zip(new.block_caches, self.block_caches, indices, strict=True):
            own_block.rows = len(index)
            for own, theirs in own_block.pairs(other_block):
                visible = slice(self.columns.low, self.columns.end)
                own[:, :, visible] = theirs[:, :, visible].index_select(0, index.to(theirs.device))
        return new

    def select(self, index: Int[Tensor, " chosen"], blocks: Sequence[int]) -> None:
        """Make the rows of ``blocks`` the rows ``index``, which may repeat; the other blocks keep theirs."""
        for block in blocks:
            cached = self.block_caches[block]
            for name in ("keys", "values"):
                held = getattr(cached, name)
                chosen = held.new_empty(len(index), *held.shape[1:])
                visible = slice(self.columns.low, self.columns.end)
                chosen[:, :, visible] = held[:, :, visible].index_select(0, index.to(held.device))
                setattr(cached, name, chosen)

    def admit(self, other: "EngineCache", rows: slice, indices: Sequence[Int[Tensor, " chosen"]], first: int = 0) -> None:
        """Copy another cache's visible columns into ``rows``, to end where the next tokens will be written.

        Args:
            other: a cache with the keys and values of prompts; each of its layers is freed once it is copied.
            rows: the rows of this cache that they go to.
            indices: per block, which row of ``other`` each of them takes.
            first: the blocks before this one are left alone.
        """
        width = other.columns.visible
        assert width <= self.columns.end, "a prompt is wider than the columns before it"
        for own_block, other_block, index in list(zip(self.block_caches, other.block_caches, indices, strict=True))[first:]:
            for own, theirs in own_block.pairs(other_block):
                taken = theirs[:, :, other.columns.low : other.columns.end]
                own[rows, :, self.columns.end - width : self.columns.end] = taken.index_select(0, index.to(taken.device))
            other_block.keys = other_block.values = None

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the visible columns of rows ``sources`` over those of rows ``targets``."""
        if not sources:
            return
        for block in self.block_caches:
            for held in (block.keys, block.values):
                assert held is not None
                held[list(targets), :, block.visible] = held[list(sources), :, block.visible]

    def clear(self, rows: Sequence[int]) -> None:
        """Set all columns of ``rows`` to zero, for whoever comes next: attention multiplies even masked values, and a NaN would stay one."""
        for block in self.block_caches:
            for held in (block.keys, block.values):
                assert held is not None
                held[list(rows)] = 0

    def rebase(self, rows: int, end: int) -> None:
        """Move the visible columns of the first ``rows`` rows so that they end at column ``end``."""
        low, width = self.columns.low, self.columns.visible
        for block in self.block_caches:
            for held in (block.keys, block.values):
                assert held is not None
                held[:rows, :, end - width : end] = held[:rows, :, low : low + width].clone()
        self.columns.low, self.columns.end = end - width, end

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return sum(held.nbytes for block in self.block_caches for held in (block.keys, block.values) if held is not None)
