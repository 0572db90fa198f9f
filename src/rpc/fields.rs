//! Fields of control parts: written one after the other, read with every length judged.

use super::frame::Violation;

/// Appends fields to a buffer.
pub(super) struct Put<'a>(pub(super) &'a mut Vec<u8>);

impl Put<'_> {
    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Bytes whose length the reader knows.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Bytes behind their length.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len()).raw(bytes)
    }

    /// The length of what follows. Nothing that is sent has 2^32 parts.
    pub(super) fn count(&mut self, len: usize) -> &mut Self {
        self.u32(u32::try_from(len).unwrap_or(u32::MAX))
    }

    pub(super) fn u32s(&mut self, values: &[u32]) -> &mut Self {
        self.0.reserve(values.len() * 4);
        for value in values {
            self.0.extend_from_slice(&value.to_le_bytes());
        }
        self
    }
}

/// Reads fields. Whatever is not there is a [`Violation::Malformed`] of `what`.
pub(super) struct Get<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Get<'a> {
    pub(super) fn new(rest: &'a [u8], what: &'static str) -> Self {
        Self { rest, what }
    }

    pub(super) fn malformed(&self) -> Violation {
        Violation::Malformed(self.what)
    }

    pub(super) fn raw(&mut self, len: usize) -> Result<&'a [u8], Violation> {
        let (value, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.malformed())?;
        self.rest = rest;
        Ok(value)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Violation> {
        let (value, rest) = self.rest.split_first_chunk().ok_or_else(|| self.malformed())?;
        self.rest = rest;
        Ok(*value)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Violation> {
        self.array::<1>().map(|[value]| value)
    }

    /// A byte that is one or zero.
    pub(super) fn flag(&mut self) -> Result<bool, Violation> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.malformed()),
        }
    }

    pub(super) fn u32(&mut self) -> Result<u32, Violation> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Violation> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Violation> {
        let len = self.count(1)?;
        self.raw(len)
    }

    /// The number of parts that follow, each of at least `bytes_min` bytes: never more than there
    /// can be in what is left.
    pub(super) fn count(&mut self, bytes_min: usize) -> Result<usize, Violation> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count.saturating_mul(bytes_min) > self.rest.len() {
            return Err(self.malformed());
        }
        Ok(count)
    }

    pub(super) fn u32s<T: FromIterator<u32>>(&mut self, count: usize) -> Result<T, Violation> {
        let bytes = self.raw(count.saturating_mul(4))?;
        let number = |c: &[u8]| u32::from_le_bytes([c[0], c[1], c[2], c[3]]);
        Ok(bytes.chunks_exact(4).map(number).collect())
    }

    /// All values that are left.
    pub(super) fn rest_u32s<T: FromIterator<u32>>(&mut self) -> Result<T, Violation> {
        if !self.rest.len().is_multiple_of(4) {
            return Err(self.malformed());
        }
        self.u32s(self.rest.len() / 4)
    }

    /// Text; what is not UTF-8 in it is replaced.
    pub(super) fn rest_text(&mut self) -> String {
        String::from_utf8_lossy(std::mem::take(&mut self.rest)).into_owned()
    }

    pub(super) fn end(&self) -> Result<(), Violation> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed()) }
    }
}
