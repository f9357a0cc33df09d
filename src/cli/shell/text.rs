//! Where statements end: outside strings, quoted names and comments.

/// Whether there is nothing but white space, comments and `;`.
pub fn is_blank(text: &str) -> bool {
    let mut code = false;
    walk(text, &mut |c| {
        code |= !c.is_whitespace() && c != ';';
        false
    });
    !code
}

/// The text from its first code on.
pub fn from_code(text: &str) -> &str {
    let begin = walk(text, &mut |c| !c.is_whitespace());
    begin.map_or("", |end| &text[text[..end].char_indices().next_back().map_or(0, |(at, _)| at)..])
}

/// Just behind the first `;` that is in no string, no quoted name and no comment.
pub fn statement_end(text: &str) -> Option<usize> {
    walk(text, &mut |c| c == ';')
}

/// Whether Enter runs it: a command of the shell, nothing, or statements all of which end with `;`.
pub fn is_complete(text: &str) -> bool {
    let code = from_code(text);
    if is_command(code) || is_word(code) {
        return true;
    }
    let mut rest = text;
    while let Some(end) = statement_end(rest) {
        rest = &rest[end..];
    }
    from_code(rest).is_empty() && !is_open(rest)
}

/// Whether a text that begins with code is a command of the shell.
pub fn is_command(code: &str) -> bool {
    code.starts_with('\\') || code.starts_with('.') && !code[1..].starts_with(|c: char| c.is_ascii_digit())
}

/// Words that people type to leave or for help.
pub fn is_word(code: &str) -> bool {
    ["quit", "exit", "help"].contains(&code.trim_end().trim_end_matches(';').to_ascii_lowercase().as_str())
}

/// Whether the text ends within quotes.
pub fn open_quote(text: &str) -> Option<(char, usize)> {
    let mut scan = Scan::new(text);
    while scan.next().is_some() {}
    scan.quote
}

/// Whether the text ends within quotes or a block comment.
fn is_open(text: &str) -> bool {
    let mut scan = Scan::new(text);
    while scan.next().is_some() {}
    scan.quote.is_some() || scan.block > 0
}

/// Goes through the characters outside comments until one is what is wanted; those between quotes count as `'`. Where
/// that one ends.
fn walk(text: &str, wanted: &mut dyn FnMut(char) -> bool) -> Option<usize> {
    let mut scan = Scan::new(text);
    scan.by_ref().find(|(c, _)| wanted(*c)).map(|(_, end)| end)
}

/// Characters of code and where each ends.
struct Scan<'a> {
    chars: std::iter::Peekable<std::str::CharIndices<'a>>,
    /// The quote that is open, and where it stands.
    quote: Option<(char, usize)>,
    line: bool,
    /// Depth of block comments.
    block: usize,
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self { chars: text.char_indices().peekable(), quote: None, line: false, block: 0 }
    }
}

impl Iterator for Scan<'_> {
    type Item = (char, usize);

    fn next(&mut self) -> Option<(char, usize)> {
        loop {
            let (at, c) = self.chars.next()?;
            let end = at + c.len_utf8();
            let next = self.chars.peek().map(|(_, next)| *next);
            if self.line {
                self.line = c != '\n';
            } else if self.block > 0 {
                match (c, next) {
                    ('*', Some('/')) => self.block -= 1,
                    ('/', Some('*')) => self.block += 1,
                    _ => continue,
                }
                self.chars.next();
            } else if let Some((open, _)) = self.quote {
                if c == open {
                    self.quote = None;
                }
                return Some(('\'', end));
            } else {
                match (c, next) {
                    ('-', Some('-')) => self.line = true,
                    ('/', Some('*')) => {
                        self.block = 1;
                        self.chars.next();
                    }
                    ('\'' | '"', _) => {
                        self.quote = Some((c, at));
                        return Some(('\'', end));
                    }
                    _ => return Some((c, end)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_end_outside_strings_and_comments() {
        for (text, statement) in [
            ("SELECT 1; SELECT 2;", "SELECT 1;"),
            ("SELECT ';'';', \";\" ; x", "SELECT ';'';', \";\" ;"),
            ("SELECT 1 -- it's ;\n; x", "SELECT 1 -- it's ;\n;"),
            ("/* ; /* ; */ ' */ SELECT 'ä;' ;", "/* ; /* ; */ ' */ SELECT 'ä;' ;"),
        ] {
            assert_eq!(statement_end(text).map(|end| &text[..end]), Some(statement), "{text}");
        }
        for text in ["SELECT 1", "SELECT ';", "SELECT 1 -- ;", "/* ;"] {
            assert_eq!(statement_end(text), None, "{text}");
        }
        assert!(is_blank(" ;-- x\n/* y */"));
        assert!(!is_blank("''") && !is_blank("1"));
        assert_eq!(from_code(" -- ;\n /* \\q */ .mode csv\nä"), ".mode csv\nä");
        assert_eq!(from_code(" -- ;"), "");
        assert_eq!(from_code("\n'é'"), "'é'");
    }

    #[test]
    fn enter_runs_what_is_whole() {
        for whole in [
            "",
            " ",
            "SELECT 1;",
            "SELECT 1; -- x",
            "SELECT ';' ; SELECT 2;\n",
            "\\d",
            " .mode csv",
            "quit",
            "Exit;",
        ] {
            assert!(is_complete(whole), "{whole}");
        }
        for part in ["SELECT 1", "SELECT 1; SELECT 2", "SELECT ';", "SELECT 1; /* ;", "quite", "SELECT 1; '"]
        {
            assert!(!is_complete(part), "{part}");
        }
        assert_eq!(open_quote("SELECT 'a' FROM './x"), Some(('\'', 16)));
        assert_eq!(open_quote("SELECT 'a' -- it's"), None);
    }
}
