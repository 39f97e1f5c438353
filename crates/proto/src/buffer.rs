//! Pooled, 4 KiB-aligned, reference-counted buffers.
//!
//! A payload is received once into a `BufMut`, frozen into a `Buf`, and from then on only its
//! handle moves: slices and clones share the pages. The pages go back to their pool when the last
//! handle is dropped, so a buffer can never be reused while a disk or socket still owns a handle.
//! The pool keeps free pages in size classes (powers of two) up to a bound and is cheap to clone.

use crate::BLOCK_BYTES;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Largest single buffer: the wire payload limit of 1 MiB plus one header page.
pub const BUFFER_BYTES_MAX: usize = (1 << 20) + BLOCK_BYTES;
/// Size classes: 2^0 .. 2^9 blocks (4 KiB .. 2 MiB).
const CLASSES: usize = 10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK_BYTES]);

struct Shared {
    free: Mutex<Vec<Vec<Box<[Page]>>>>,
    keep_per_class_bytes: usize,
}

/// Where buffers come from and go back to. Clones share one pool.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

impl Pool {
    /// Make a pool that keeps at most `keep_bytes` of free pages per size class.
    #[must_use]
    pub fn new(keep_bytes: usize) -> Pool {
        Pool(Arc::new(Shared {
            free: Mutex::new((0..CLASSES).map(|_| Vec::new()).collect()),
            keep_per_class_bytes: keep_bytes,
        }))
    }

    /// Take a buffer of `len` bytes. Its content is unspecified (it may hold old data).
    ///
    /// Panics if `len` is 0 or above [`BUFFER_BYTES_MAX`]: callers check lengths at the edge.
    #[must_use]
    pub fn alloc(&self, len: usize) -> BufMut {
        assert!(len > 0 && len <= BUFFER_BYTES_MAX, "buffer of {len} bytes asked for");
        let class = class_of(len);
        let reused = self.0.free.lock().expect("no panic happens under this lock")[class].pop();
        let pages = reused.unwrap_or_else(|| {
            <[Page]>::new_box_zeroed_with_elems(1 << class).expect("memory for one buffer")
        });
        BufMut { owner: Owner { pages, home: Some(self.clone()) }, len }
    }

    /// Take a buffer of `len` zero bytes.
    #[must_use]
    pub fn zeroed(&self, len: usize) -> BufMut {
        let mut buf = self.alloc(len);
        buf.fill(0);
        buf
    }

    /// Take a buffer holding a copy of `bytes`.
    #[must_use]
    pub fn copy_of(&self, bytes: &[u8]) -> BufMut {
        let mut buf = self.alloc(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }
}

fn class_of(len: usize) -> usize {
    len.div_ceil(BLOCK_BYTES).next_power_of_two().trailing_zeros() as usize
}

struct Owner {
    pages: Box<[Page]>,
    home: Option<Pool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let Some(home) = self.home.take() else { return };
        let class = self.pages.len().trailing_zeros() as usize;
        let mut free = home.0.free.lock().expect("no panic happens under this lock");
        if (free[class].len() + 1) * self.pages.len() * BLOCK_BYTES <= home.0.keep_per_class_bytes {
            free[class].push(std::mem::take(&mut self.pages));
        }
    }
}

/// A buffer with one owner, still being filled.
pub struct BufMut {
    owner: Owner,
    len: usize,
}

impl BufMut {
    /// Give up the right to write; from here on the bytes never change.
    #[must_use]
    pub fn freeze(self) -> Buf {
        let len = self.len;
        Buf { owner: Arc::new(self.owner), start: 0, len }
    }

    /// Shorten to `len` bytes, for a read that brought less than the buffer holds.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "truncate never grows");
        self.len = len;
    }
}

impl Deref for BufMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.pages.as_bytes()[..self.len]
    }
}

impl DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.owner.pages.as_mut_bytes()[..self.len]
    }
}

/// An immutable buffer or a slice of one. Clones and slices share the pages.
#[derive(Clone)]
pub struct Buf {
    owner: Arc<Owner>,
    start: usize,
    len: usize,
}

impl Buf {
    /// The bytes `range` of this buffer, sharing its pages.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(range.start <= range.end && range.end <= self.len, "slice inside the buffer");
        Buf { owner: Arc::clone(&self.owner), start: self.start + range.start, len: range.len() }
    }

    /// Block `index` (4 KiB) of this buffer, sharing its pages.
    #[must_use]
    pub fn block(&self, index: usize) -> Buf {
        self.slice(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES)
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.pages.as_bytes()[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_come_back() {
        let pool = Pool::new(1 << 20);
        let mut first = pool.alloc(5000);
        first.fill(7);
        let address = first.as_ptr() as usize;
        assert_eq!(address % BLOCK_BYTES, 0);
        let frozen = first.freeze();
        let tail = frozen.slice(4096..5000);
        drop(frozen);
        assert!(tail.iter().all(|&byte| byte == 7), "a slice keeps the pages alive");
        drop(tail);
        assert_eq!(pool.alloc(8192).as_ptr() as usize, address, "same class, same pages");
    }

    #[test]
    fn pool_keeps_no_more_than_it_was_told() {
        let pool = Pool::new(8192);
        let many: Vec<_> = (0..8).map(|_| pool.alloc(4096)).collect();
        drop(many);
        assert_eq!(pool.0.free.lock().expect("not poisoned")[0].len(), 2);
    }
}
