//! A strict JSON reader (RFC 8259) over one text: no tree, no allocation, errors with their place.
//!
//! It is our own because the decoder needs what a general library hides: the very text of a number (decimals are
//! exact, floats correctly rounded), the text of a wrong value for the message, and a peek at an expected key.

/// Deeper nesting is refused, also in fields that are skipped.
const MAX_DEPTH: u32 = 128;

/// The text is not JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Syntax {
    /// Byte offset in the text.
    pub at: usize,
    pub expected: &'static str,
}

/// A number as it stands in the text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number<'a> {
    pub text: &'a str,
    /// All digits as one integer, point ignored; only valid if `exact`.
    mantissa: u64,
    fraction_digits: u32,
    negative: bool,
    /// At most 18 digits and no exponent.
    exact: bool,
}

const POWERS: [f64; 19] =
    [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18];

impl Number<'_> {
    /// The value, if it is a short integer without point and exponent (the usual case).
    #[inline]
    pub fn small_integer(&self) -> Option<i64> {
        if !self.exact || self.fraction_digits != 0 {
            return None;
        }
        // 18 digits at most, so it fits with either sign.
        let value = self.mantissa as i64;
        Some(if self.negative { -value } else { value })
    }

    /// The value, if mantissa and power of ten are both exact doubles: then one division rounds correctly.
    #[inline]
    pub fn short_double(&self) -> Option<f64> {
        if !self.exact || self.mantissa > 1 << 53 {
            return None;
        }
        let value = self.mantissa as f64 / POWERS[self.fraction_digits as usize];
        Some(if self.negative { -value } else { value })
    }
}

pub(super) struct Scanner<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    pub fn new(text: &'a str) -> Self {
        Self { text, bytes: text.as_bytes(), at: 0 }
    }

    pub fn position(&self) -> usize {
        self.at
    }

    pub fn rewind(&mut self, position: usize) {
        self.at = position;
    }

    pub fn text_from(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or("")
    }

    #[cold]
    pub fn syntax(&self, expected: &'static str) -> Syntax {
        Syntax { at: self.at, expected }
    }

    /// The next byte that is no white space, not consumed; 0 at the end of the text.
    #[inline]
    pub fn peek(&mut self) -> u8 {
        while let Some(byte) = self.bytes.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return *byte;
            }
            self.at += 1;
        }
        0
    }

    /// Consumes the byte that was just peeked.
    #[inline]
    pub fn advance(&mut self) {
        self.at += 1;
    }

    #[inline]
    pub fn take(&mut self, wanted: u8, expected: &'static str) -> Result<(), Syntax> {
        if self.peek() != wanted {
            return Err(self.syntax(expected));
        }
        self.at += 1;
        Ok(())
    }

    pub fn end(&mut self) -> Result<(), Syntax> {
        self.peek();
        if self.at < self.bytes.len() { Err(self.syntax("the end of the record")) } else { Ok(()) }
    }

    pub fn word(&mut self, word: &'static str) -> Result<(), Syntax> {
        if !self.bytes[self.at..].starts_with(word.as_bytes()) {
            return Err(self.syntax(word));
        }
        self.at += word.len();
        Ok(())
    }

    /// Consumes `"name"` and the colon if exactly that comes next. `name` must not need escapes.
    #[inline]
    pub fn take_key(&mut self, name: &[u8]) -> bool {
        let rest = &self.bytes[self.at..];
        let fits = rest.first() == Some(&b'"')
            && rest.get(1..=name.len()) == Some(name)
            && rest.get(name.len() + 1..name.len() + 3) == Some(b"\":");
        if fits {
            self.at += name.len() + 3;
        }
        fits
    }

    /// A string; the result borrows from the text unless it has escapes, which are resolved in `scratch`.
    #[inline]
    pub fn string<'s>(&mut self, scratch: &'s mut String) -> Result<&'s str, Syntax>
    where
        'a: 's,
    {
        self.take(b'"', "a string")?;
        let start = self.at;
        self.at = self.stop_from(start);
        if self.bytes.get(self.at) == Some(&b'"') {
            self.at += 1;
            return Ok(&self.text[start..self.at - 1]);
        }
        self.escaped_string(start, scratch)
    }

    #[cold]
    fn escaped_string<'s>(&mut self, start: usize, scratch: &'s mut String) -> Result<&'s str, Syntax> {
        scratch.clear();
        scratch.push_str(&self.text[start..self.at]);
        loop {
            match self.bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(scratch);
                }
                Some(b'\\') => {
                    self.at += 1;
                    scratch.push(self.escape()?);
                }
                Some(_) => return Err(self.syntax("no control character in a string")),
                None => return Err(self.syntax("the end of a string")),
            }
            let from = self.at;
            self.at = self.stop_from(from);
            scratch.push_str(&self.text[from..self.at]);
        }
    }

    /// Offset of the first quote, backslash or control character, eight bytes at a time.
    #[inline]
    fn stop_from(&self, mut at: usize) -> usize {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGHS: u64 = 0x8080_8080_8080_8080;
        while let Some(chunk) = self.bytes[at..].first_chunk::<8>() {
            let word = u64::from_le_bytes(*chunk);
            let quote = word ^ (ONES * b'"' as u64);
            let slash = word ^ (ONES * b'\\' as u64);
            // A borrow can only mark bytes after a true hit, so the lowest mark is always right.
            let marks = (word.wrapping_sub(ONES * 0x20) & !word)
                | (quote.wrapping_sub(ONES) & !quote)
                | (slash.wrapping_sub(ONES) & !slash);
            if marks & HIGHS != 0 {
                return at + (marks & HIGHS).trailing_zeros() as usize / 8;
            }
            at += 8;
        }
        let stops = |b: &u8| *b == b'"' || *b == b'\\' || *b < 0x20;
        at + self.bytes[at..].iter().position(stops).unwrap_or(self.bytes.len() - at)
    }

    fn escape(&mut self) -> Result<char, Syntax> {
        let Some(byte) = self.bytes.get(self.at) else { return Err(self.syntax("an escape")) };
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => *byte as char,
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return self.unicode_escape(),
            _ => {
                self.at -= 1;
                return Err(self.syntax("an escape"));
            }
        })
    }

    fn unicode_escape(&mut self) -> Result<char, Syntax> {
        let first = self.hex()?;
        let code = if (0xD800..0xDC00).contains(&first) {
            if !self.bytes[self.at..].starts_with(b"\\u") {
                return Err(self.syntax("the second half of a surrogate pair"));
            }
            self.at += 2;
            let second = self.hex()?;
            if !(0xDC00..0xE000).contains(&second) {
                return Err(self.syntax("the second half of a surrogate pair"));
            }
            0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00)
        } else {
            first
        };
        char::from_u32(code).ok_or_else(|| self.syntax("a Unicode character"))
    }

    fn hex(&mut self) -> Result<u32, Syntax> {
        let digits = self.bytes.get(self.at..self.at + 4).ok_or_else(|| self.syntax("four hex digits"))?;
        let mut code = 0;
        for digit in digits {
            let value = (*digit as char).to_digit(16).ok_or_else(|| self.syntax("four hex digits"))?;
            code = code * 16 + value;
        }
        self.at += 4;
        Ok(code)
    }

    #[inline]
    pub fn number(&mut self) -> Result<Number<'a>, Syntax> {
        let start = self.at;
        let negative = self.bytes.get(self.at) == Some(&b'-');
        self.at += usize::from(negative);
        let first_digit = self.at;
        let mut mantissa = 0_u64;
        self.digits(&mut mantissa)?;
        if self.bytes[first_digit] == b'0' && self.at > first_digit + 1 {
            self.at = first_digit + 1;
            return Err(self.syntax("no digit after a leading zero"));
        }
        let mut digits = self.at - first_digit;
        let mut fraction_digits = 0;
        if self.bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            let from = self.at;
            self.digits(&mut mantissa)?;
            fraction_digits = self.at - from;
            digits += fraction_digits;
        }
        let exponent = matches!(self.bytes.get(self.at), Some(b'e' | b'E'));
        if exponent {
            self.at += 1;
            self.at += usize::from(matches!(self.bytes.get(self.at), Some(b'+' | b'-')));
            self.digits(&mut 0)?;
        }
        Ok(Number {
            text: &self.text[start..self.at],
            mantissa,
            fraction_digits: fraction_digits as u32,
            negative,
            exact: digits <= 18 && !exponent,
        })
    }

    /// One or more digits, appended to `value` (which wraps when there are too many: see `Number::exact`).
    #[inline]
    fn digits(&mut self, value: &mut u64) -> Result<(), Syntax> {
        let start = self.at;
        while let Some(digit) = self.bytes.get(self.at).map(|b| b.wrapping_sub(b'0')).filter(|d| *d < 10) {
            *value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
            self.at += 1;
        }
        if self.at == start { Err(self.syntax("a digit")) } else { Ok(()) }
    }

    /// Passes over one value of any kind. Nesting is held in the bits of one word (1 = object), not on the stack.
    pub fn skip_value(&mut self) -> Result<(), Syntax> {
        let mut objects: u128 = 0;
        let mut depth: u32 = 0;
        loop {
            match self.peek() {
                open @ (b'{' | b'[') => {
                    self.at += 1;
                    if depth == MAX_DEPTH {
                        return Err(self.syntax("no nesting deeper than 128"));
                    }
                    let object = open == b'{';
                    objects = objects << 1 | u128::from(object);
                    depth += 1;
                    let close = if object { b'}' } else { b']' };
                    if self.peek() != close {
                        if object {
                            self.skip_key()?;
                        }
                        continue;
                    }
                }
                b'"' => self.skip_string()?,
                b't' => self.word("true")?,
                b'f' => self.word("false")?,
                b'n' => self.word("null")?,
                b'-' | b'0'..=b'9' => {
                    self.number()?;
                }
                _ => return Err(self.syntax("a value")),
            }
            if self.close_containers(&mut objects, &mut depth)? {
                return Ok(());
            }
        }
    }

    /// After a value: closes what ends here; true when the outermost value is complete.
    fn close_containers(&mut self, objects: &mut u128, depth: &mut u32) -> Result<bool, Syntax> {
        while *depth > 0 {
            let object = *objects & 1 == 1;
            match (self.peek(), object) {
                (b',', _) => {
                    self.at += 1;
                    if object {
                        self.skip_key()?;
                    }
                    return Ok(false);
                }
                (b'}', true) | (b']', false) => {
                    self.at += 1;
                    *objects >>= 1;
                    *depth -= 1;
                }
                (_, true) => return Err(self.syntax("a comma or }")),
                (_, false) => return Err(self.syntax("a comma or ]")),
            }
        }
        Ok(true)
    }

    fn skip_key(&mut self) -> Result<(), Syntax> {
        self.peek();
        self.skip_string()?;
        self.take(b':', "a colon")
    }

    /// Like `string`, but lone surrogates pass: the string is not kept.
    fn skip_string(&mut self) -> Result<(), Syntax> {
        self.take(b'"', "a string")?;
        loop {
            self.at = self.stop_from(self.at);
            match self.bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    self.at += 1;
                    if self.bytes.get(self.at) == Some(&b'u') {
                        self.at += 1;
                        self.hex()?;
                    } else {
                        self.escape()?;
                    }
                }
                Some(_) => return Err(self.syntax("no control character in a string")),
                None => return Err(self.syntax("the end of a string")),
            }
        }
    }
}
