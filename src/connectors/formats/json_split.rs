//! A file of JSON → records: one per line, or the elements of one array (an export of Elasticsearch is either).
//!
//! Only brackets and strings are looked at; whether an element is JSON is the decoder's matter. A file whose first
//! character is `[` is an array. A line is a record whatever it holds; blank lines are none.

/// Cuts a file that comes in pieces.
#[derive(Debug, Default)]
pub struct JsonSplitter {
    buffer: Vec<u8>,
    /// Where the next record begins.
    next: usize,
    /// The file's kind, once its first character was seen.
    array: Option<bool>,
    ended: bool,
}

impl JsonSplitter {
    /// Adds the next piece of the file; what was handed out before goes.
    pub fn feed(&mut self, piece: &[u8]) {
        self.buffer.drain(..self.next);
        self.next = 0;
        self.buffer.extend_from_slice(piece);
    }

    /// No piece follows.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The next record; `None` when it takes another piece, or the file is at its end.
    pub fn record(&mut self) -> Option<&[u8]> {
        let array = match self.array {
            Some(array) => array,
            None => {
                self.skip(|byte| byte.is_ascii_whitespace());
                let first = *self.buffer.get(self.next)?;
                self.array = Some(first == b'[');
                self.next += usize::from(first == b'[');
                first == b'['
            }
        };
        let end = if array { self.element() } else { self.line() }?;
        let record = self.next..end;
        self.next = end;
        Some(&self.buffer[record])
    }

    fn skip(&mut self, which: impl Fn(u8) -> bool) {
        let rest = &self.buffer[self.next..];
        self.next += rest.iter().take_while(|byte| which(**byte)).count();
    }

    fn line(&mut self) -> Option<usize> {
        self.skip(|byte| byte.is_ascii_whitespace());
        let rest = &self.buffer[self.next..];
        match rest.iter().position(|byte| *byte == b'\n') {
            Some(length) => Some(self.next + length),
            None if self.ended && !rest.is_empty() => Some(self.buffer.len()),
            None => None,
        }
    }

    fn element(&mut self) -> Option<usize> {
        self.skip(|byte| byte.is_ascii_whitespace() || byte == b',');
        let rest = &self.buffer[self.next..];
        let (mut depth, mut string, mut escaped) = (0usize, false, false);
        for (at, byte) in rest.iter().enumerate() {
            match (string, byte) {
                (true, _) if escaped => escaped = false,
                (true, b'\\') => escaped = true,
                (_, b'"') => string = !string,
                (true, _) => {}
                (false, b'{' | b'[') => depth += 1,
                // The end of the array; what stands behind it is not read.
                (false, b']') if depth == 0 && at == 0 => {
                    self.next = self.buffer.len();
                    return None;
                }
                (false, b',' | b']') if depth == 0 => return Some(self.next + at),
                (false, b'}' | b']') => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return Some(self.next + at + 1);
                    }
                }
                _ => {}
            }
        }
        // An element without its end is a record that will not decode.
        (self.ended && !rest.is_empty()).then_some(self.buffer.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of a file that comes in pieces of `size`.
    fn split(file: &str, size: usize) -> Vec<String> {
        let (mut splitter, mut records) = (JsonSplitter::default(), Vec::new());
        let mut drain = |splitter: &mut JsonSplitter| {
            while let Some(record) = splitter.record() {
                records.push(String::from_utf8_lossy(record).trim().to_owned());
            }
        };
        for piece in file.as_bytes().chunks(size) {
            splitter.feed(piece);
            drain(&mut splitter);
        }
        splitter.end();
        drain(&mut splitter);
        records
    }

    #[test]
    fn lines_and_arrays_however_they_are_cut() {
        let objects =
            [r#"{"a": "x, ]} \" \\"}"#, r#"{"b": [1, {"c": [2]}], "d": "\\\""}"#, "{}", "7", "\"t,\""];
        let lines = format!("\n {}\r\n\n", objects.join("\n"));
        let array = format!("\n[ {} \n]\n", objects.join(" ,\n"));
        for size in [1, 2, 3, 7, 1_000] {
            assert_eq!(split(&lines, size), objects, "lines, {size}");
            assert_eq!(split(&array, size), objects, "array, {size}");
            assert_eq!(split(&objects.join("\n"), size), objects, "no last newline, {size}");
            for empty in ["", " \n", "[]", " [ ] "] {
                assert!(split(empty, size).is_empty(), "{empty}");
            }
            assert_eq!(split("[{\"a\": 1}, {\"b\"", size), ["{\"a\": 1}", "{\"b\""], "cut off");
            assert_eq!(split("{\"a\"\n[1, 2]\nx", size), ["{\"a\"", "[1, 2]", "x"], "bad lines");
        }
    }
}
