//! The text that is being typed, and what keys do to it. Knows no terminal.
//!
//! A text may have several lines. Up and Down go through its lines and, beyond them, through the history; Enter runs a text
//! that is whole and else begins a line. What is pasted is taken as it is: nothing runs before Enter.

use unicode_width::UnicodeWidthChar;

use super::history::History;
use super::text::is_complete;
use super::words::Words;

/// What was pressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    Text(String),
    Enter,
    NewLine,
    Tab,
    Backspace,
    Delete,
    Left,
    Right,
    Up,
    Down,
    WordLeft,
    WordRight,
    Home,
    End,
    CutWordLeft,
    CutWordRight,
    CutToEnd,
    CutToStart,
    Yank,
    Search,
    Clear,
    Interrupt,
    EndOfInput,
    Other,
}

/// What the shell does after a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    On,
    Clear,
    Run(String),
    Interrupted,
    Leave,
}

#[derive(Debug, Default)]
pub struct Editor {
    text: String,
    /// A byte of `text`.
    cursor: usize,
    history: History,
    /// The entry that is shown, and what was typed before the first one was.
    entry: Option<(usize, String)>,
    cut: String,
    words: Words,
    /// What Tab offers, below the text.
    offered: Vec<String>,
    /// What is searched for, and the entry found.
    search: Option<(String, Option<usize>)>,
}

impl Editor {
    pub fn new(history: History, words: Words) -> Self {
        Self { history, words, ..Self::default() }
    }

    pub fn press(&mut self, key: Key) -> Step {
        self.offered.clear();
        if self.search.is_some() {
            match self.press_in_search(&key) {
                true => return Step::On,
                false => self.search = None,
            }
        }
        match key {
            Key::Text(text) => self.insert(&text),
            Key::Enter if is_complete(&self.text) => return self.run(),
            Key::Enter | Key::NewLine => self.insert("\n"),
            Key::Tab => self.complete(),
            Key::Backspace => self.remove(self.left(), self.cursor),
            Key::Delete => self.remove(self.cursor, self.right()),
            Key::Left => self.cursor = self.left(),
            Key::Right => self.cursor = self.right(),
            Key::Up => self.vertical(true),
            Key::Down => self.vertical(false),
            Key::WordLeft => self.cursor = self.word_left(),
            Key::WordRight => self.cursor = self.word_right(),
            Key::Home => self.cursor = self.line_start(self.cursor),
            Key::End => self.cursor = self.line_end(self.cursor),
            Key::CutWordLeft => self.cut(self.word_left(), self.cursor),
            Key::CutWordRight => self.cut(self.cursor, self.word_right()),
            Key::CutToEnd => {
                let end = self.line_end(self.cursor);
                // At the end of a line: the line break.
                self.cut(self.cursor, if end == self.cursor { self.right() } else { end });
            }
            Key::CutToStart => self.cut(self.line_start(self.cursor), self.cursor),
            Key::Yank => self.insert(&self.cut.clone()),
            Key::Search => self.search = Some((String::new(), None)),
            Key::Clear => return Step::Clear,
            Key::Interrupt => {
                self.reset();
                return Step::Interrupted;
            }
            Key::EndOfInput if self.text.is_empty() => return Step::Leave,
            Key::EndOfInput => self.remove(self.cursor, self.right()),
            Key::Other => {}
        }
        Step::On
    }

    fn run(&mut self) -> Step {
        let text = std::mem::take(&mut self.text);
        self.reset();
        self.history.add(&text);
        Step::Run(text)
    }

    fn reset(&mut self) {
        self.text.clear();
        (self.cursor, self.entry, self.search) = (0, None, None);
    }

    fn insert(&mut self, text: &str) {
        let clean: String =
            text.replace('\t', "    ").chars().filter(|c| *c == '\n' || !c.is_control()).collect();
        self.text.insert_str(self.cursor, &clean);
        self.cursor += clean.len();
    }

    fn remove(&mut self, from: usize, to: usize) {
        self.text.replace_range(from..to, "");
        self.cursor = from;
    }

    fn cut(&mut self, from: usize, to: usize) {
        if from < to {
            self.cut = self.text[from..to].to_owned();
            self.remove(from, to);
        }
    }

    fn left(&self) -> usize {
        self.text[..self.cursor].char_indices().next_back().map_or(0, |(at, _)| at)
    }

    fn right(&self) -> usize {
        self.text[self.cursor..].chars().next().map_or(self.cursor, |c| self.cursor + c.len_utf8())
    }

    fn word_left(&self) -> usize {
        let before = self.text[..self.cursor].trim_end_matches(|c: char| !is_letter(c));
        before.trim_end_matches(is_letter).len()
    }

    fn word_right(&self) -> usize {
        let after = self.text[self.cursor..].trim_start_matches(|c: char| !is_letter(c));
        self.text.len() - after.trim_start_matches(is_letter).len()
    }

    fn line_start(&self, at: usize) -> usize {
        self.text[..at].rfind('\n').map_or(0, |end| end + 1)
    }

    fn line_end(&self, at: usize) -> usize {
        self.text[at..].find('\n').map_or(self.text.len(), |end| at + end)
    }

    /// To the line above or below, else to the entry before or after.
    fn vertical(&mut self, up: bool) {
        let start = self.line_start(self.cursor);
        let column = self.text[start..self.cursor].chars().count();
        let target = match up {
            true => start.checked_sub(1).map(|end| self.line_start(end)),
            false => Some(self.line_end(self.cursor) + 1).filter(|start| *start <= self.text.len()),
        };
        match target {
            Some(start) => {
                let line = &self.text[start..self.line_end(start)];
                let length = line.char_indices().nth(column).map_or(line.len(), |(at, _)| at);
                self.cursor = start + length;
            }
            None => self.recall(up),
        }
    }

    fn recall(&mut self, older: bool) {
        let count = self.history.entries().len();
        let next = match (&self.entry, older) {
            (None, true) => count.checked_sub(1),
            (Some((at, _)), true) => at.checked_sub(1),
            (Some((at, _)), false) => Some(at + 1),
            (None, false) => None,
        };
        let Some(next) = next else { return };
        let draft = match self.entry.take() {
            Some((_, draft)) => draft,
            None => std::mem::take(&mut self.text),
        };
        match self.history.entries().get(next) {
            Some(entry) => {
                self.text = entry.clone();
                self.entry = Some((next, draft));
            }
            None => self.text = draft,
        }
        self.cursor = self.text.len();
    }

    /// Whether the key belongs to the search.
    fn press_in_search(&mut self, key: &Key) -> bool {
        let Some((needle, found)) = &mut self.search else { return false };
        let count = self.history.entries().len();
        let below = match key {
            Key::Text(text) => {
                needle.push_str(text);
                found.map_or(count, |at| at + 1)
            }
            Key::Backspace => {
                needle.pop();
                count
            }
            Key::Search => found.unwrap_or(count),
            _ => return false,
        };
        let entries = &self.history.entries()[..below];
        let older = entries.iter().rposition(|entry| !needle.is_empty() && entry.contains(needle.as_str()));
        // An older entry that is not there leaves the one that is shown.
        *found = if *key == Key::Search { older.or(*found) } else { older };
        if let Some(entry) = found.and_then(|at| self.history.entries().get(at)) {
            self.text = entry.clone();
            self.cursor = self.text.len();
        }
        true
    }

    fn complete(&mut self) {
        let (before, after) = self.text.split_at(self.cursor);
        let offer = self.words.offer(before, after);
        let Some(first) = offer.words.first() else { return };
        let common = offer.words.iter().fold(first.as_str(), |common, word| shared(common, word)).len();
        let typed = self.cursor - offer.start;
        match offer.words.as_slice() {
            [word] => {
                let ends = !word.ends_with('/') && !after.starts_with(' ');
                let word = format!("{word}{}", if ends && !in_quotes(before) { " " } else { "" });
                self.text.replace_range(offer.start..self.cursor, &word);
                self.cursor = offer.start + word.len();
            }
            _ if common > typed => {
                self.text.replace_range(offer.start..self.cursor, &first[..common]);
                self.cursor = offer.start + common;
            }
            words => self.offered = words.to_vec(),
        }
    }

    /// What stands on a terminal that is so wide.
    pub fn screen(&self, prompt: &str, width: usize) -> Screen {
        let searching = self.search.as_ref().map(|(needle, found)| {
            let failed = if found.is_none() && !needle.is_empty() { "nothing has " } else { "" };
            format!("(search: {failed}'{needle}') ")
        });
        let prompt = searching.as_deref().unwrap_or(prompt);
        let mut screen = Screen { rows: vec![prompt.to_owned()], cursor: (0, 0), below: Vec::new() };
        let mut column = columns(prompt);
        let more = format!("{:>1$}", "... ", columns(prompt));
        for (at, c) in self.text.char_indices().chain([(self.text.len(), '\n')]) {
            let wide = c.width().unwrap_or(0);
            if column + wide.max(1) > width {
                screen.rows.push(String::new());
                column = 0;
            }
            if at == self.cursor {
                screen.cursor = (screen.rows.len() - 1, column);
            }
            if at == self.text.len() {
                break;
            }
            match c {
                '\n' => {
                    screen.rows.push(more.clone());
                    column = columns(&more);
                }
                c => {
                    screen.rows.last_mut().into_iter().for_each(|row| row.push(c));
                    column += wide;
                }
            }
        }
        screen.below = in_columns(&self.offered, width);
        screen
    }
}

/// Lines of a terminal.
#[derive(Debug, PartialEq, Eq)]
pub struct Screen {
    pub rows: Vec<String>,
    /// Row and column.
    pub cursor: (usize, usize),
    pub below: Vec<String>,
}

/// Lines of words that are offered.
const MOST_BELOW: usize = 8;

fn in_columns(words: &[String], width: usize) -> Vec<String> {
    let widest = words.iter().map(|word| columns(word)).max().unwrap_or(0) + 2;
    let per_line = (width / widest.max(1)).max(1);
    let mut lines: Vec<String> = words
        .chunks(per_line)
        .map(|chunk| {
            let line: String =
                chunk.iter().map(|word| format!("{word}{}", " ".repeat(widest - columns(word)))).collect();
            super::super::table::cut(line.trim_end(), width)
        })
        .collect();
    if lines.len() > MOST_BELOW {
        let left = words.len() - per_line * (MOST_BELOW - 1);
        lines.truncate(MOST_BELOW - 1);
        lines.push(format!("… and {left} more"));
    }
    lines
}

fn columns(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

fn is_letter(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn in_quotes(before: &str) -> bool {
    super::text::open_quote(before).is_some()
}

/// What both begin with.
fn shared<'a>(one: &'a str, other: &str) -> &'a str {
    let same = one.char_indices().zip(other.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
    &one[..same.unwrap_or(one.len().min(other.len()))]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(editor: &mut Editor, text: &str) {
        for c in text.chars() {
            let step = editor.press(if c == '\n' { Key::Enter } else { Key::Text(c.to_string()) });
            assert_eq!(step, Step::On, "{text}");
        }
    }

    fn press(editor: &mut Editor, keys: &[Key]) {
        keys.iter().for_each(|key| assert_eq!(editor.press(key.clone()), Step::On, "{key:?}"));
    }

    #[test]
    fn enter_runs_a_whole_statement_and_else_begins_a_line() {
        let mut editor = Editor::default();
        typed(&mut editor, "SELECT 40 +\n2");
        assert_eq!(editor.screen("> ", 20).rows, ["> SELECT 40 +", "... 2"]);
        typed(&mut editor, ";");
        assert_eq!(editor.press(Key::Enter), Step::Run("SELECT 40 +\n2;".to_owned()));
        assert_eq!(editor.press(Key::Enter), Step::Run(String::new()));
        typed(&mut editor, "x");
        assert_eq!(editor.press(Key::Interrupt), Step::Interrupted);
        assert_eq!(editor.press(Key::EndOfInput), Step::Leave);
        press(&mut editor, &[Key::Text("SELECT 1;\nSELECT 2;\u{7}\n".to_owned())]);
        assert_eq!(editor.press(Key::Enter), Step::Run("SELECT 1;\nSELECT 2;\n".to_owned()));
    }

    #[test]
    fn keys_move_and_cut() {
        use Key::*;
        let mut editor = Editor::default();
        typed(&mut editor, "SELECT ä.b, cd");
        press(
            &mut editor,
            &[WordLeft, Left, Left, Backspace, Backspace, Text("x".to_owned()), End, CutWordLeft],
        );
        assert_eq!(editor.text, "SELECT äx, ");
        press(&mut editor, &[Yank, Home, Delete, Right, CutToStart, End, Yank, Left, CutToEnd]);
        assert_eq!(editor.text, "LECT äx, cd");
        press(&mut editor, &[Home, CutWordRight, Home, CutToEnd, NewLine, Up, CutToEnd]);
        assert_eq!(editor.text, "");
        typed(&mut editor, "a\nbcd\n日本");
        press(&mut editor, &[Up, End, Up, Down, Right, Text("-".to_owned())]);
        assert_eq!(editor.text, "a\nbc-d\n日本");
    }

    #[test]
    fn the_history_is_gone_through_and_searched() {
        use Key::*;
        let mut editor = Editor::default();
        for text in ["SELECT 1\n+ 1;", "\\d", "SELECT 2;"] {
            typed(&mut editor, text);
            assert_eq!(editor.press(Enter), Step::Run(text.to_owned()));
        }
        typed(&mut editor, "draft");
        press(&mut editor, &[Up, Up]);
        assert_eq!(editor.text, "\\d");
        press(&mut editor, &[Up, Up, Up, Up]);
        assert_eq!((editor.text.as_str(), editor.cursor), ("SELECT 1\n+ 1;", 4));
        press(&mut editor, &[Down, Down, Down, Down]);
        assert_eq!(editor.text, "draft");
        press(&mut editor, &[Search, Text("SEL".to_owned())]);
        assert_eq!(editor.text, "SELECT 2;");
        press(&mut editor, &[Search, Search]);
        assert_eq!(editor.screen("> ", 80).rows[0], "(search: 'SEL') SELECT 1");
        press(&mut editor, &[Right]);
        assert_eq!(editor.press(Enter), Step::Run("SELECT 1\n+ 1;".to_owned()));
    }

    #[test]
    fn tab_completes_or_offers() {
        let mut editor = Editor::default();
        let columns = vec!["amount".to_owned(), "amount_7d".to_owned()];
        editor.words.relations.insert("transactions".to_owned(), columns);
        typed(&mut editor, "SELECT am");
        press(&mut editor, &[Key::Tab]);
        assert_eq!(editor.text, "SELECT amount");
        press(&mut editor, &[Key::Tab]);
        let screen = editor.screen("> ", 30);
        assert_eq!((screen.below, screen.cursor), (vec!["amount     amount_7d".to_owned()], (0, 15)));
        typed(&mut editor, " fr");
        press(&mut editor, &[Key::Tab, Key::Text("t".to_owned()), Key::Tab]);
        assert_eq!(editor.text, "SELECT amount from transactions ");
    }

    #[test]
    fn long_lines_are_broken_where_the_terminal_ends() {
        let mut editor = Editor::default();
        typed(&mut editor, "abcd日");
        assert_eq!(
            editor.screen("> ", 8),
            Screen { rows: vec!["> abcd日".to_owned(), String::new()], cursor: (1, 0), below: vec![] }
        );
        press(&mut editor, &[Key::Left]);
        assert_eq!(editor.screen("> ", 8).cursor, (0, 6));
        assert_eq!(editor.screen("> ", 7).rows, ["> abcd", "日"]);
        for width in 1..12 {
            assert!(editor.screen("", width.max(2)).rows.iter().all(|row| columns(row) <= width.max(2)));
        }
    }
}
