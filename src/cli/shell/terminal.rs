//! The terminal under the editor: keys in, lines out.
//!
//! A thread of its own reads keys, one text at a time and only when asked for one. While a text is typed, the terminal hands
//! over every key; while a query runs, Ctrl-C is a signal again, and what is typed ahead waits. The terminal's settings
//! are put back when [`Terminal`] is dropped. A terminal that cannot do this (TERM=dumb) gets plain lines.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver as Asked, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr,
};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::editor::{Editor, Key, Screen, Step};
use super::text::is_complete;
use crate::error::{Error, Result};

const PROMPT: &str = "millstream> ";
const MORE: &str = "        ... ";

/// What was typed.
#[derive(Debug)]
pub enum Typed {
    Text(String),
    Interrupted,
    End,
}

pub struct Terminal {
    wanted: SyncSender<()>,
    typed: Receiver<Typed>,
}

/// The settings before they were changed.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

impl Terminal {
    /// Takes the terminal of stdin.
    ///
    /// # Errors
    /// External: stdin cannot be read.
    pub fn open(editor: Editor, plain: bool) -> Result<Self> {
        let unread = |error: std::io::Error| Error::external("stdin cannot be read").because(error);
        let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(unread)?;
        let input = BufReader::new(File::from(input));
        let before = tcgetattr(input.get_ref()).ok().filter(|_| !plain);
        let is_raw = before.is_some();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = before;
        let (wanted, asked) = sync_channel(1);
        let (send, typed) = channel(1);
        #[expect(clippy::disallowed_methods, reason = "ends with the process; nothing waits for it")]
        std::thread::spawn(move || match is_raw {
            true => Keys { input, editor, above: 0 }.serve(&asked, &send),
            false => lines(input, &asked, &send),
        });
        Ok(Self { wanted, typed })
    }

    /// The next text; the terminal is ready for a query afterwards.
    pub async fn next(&mut self) -> Typed {
        // One that is already wanted is the same one.
        self.wanted.try_send(()).ok();
        self.typed.recv().await.unwrap_or(Typed::End)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Nothing can be done if the terminal is gone.
            tcsetattr(std::io::stdin(), OptionalActions::Now, &before).ok();
        }
    }
}

/// Settings for typing, or for running a query.
fn set(typing: bool) {
    let Some(mut modes) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
    modes.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ECHONL);
    modes.input_modes &= !(InputModes::ICRNL | InputModes::INLCR | InputModes::IXON);
    if typing {
        modes.local_modes &= !(LocalModes::ISIG | LocalModes::IEXTEN);
    }
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    // Nothing can be done if the terminal is gone; the next key says so.
    tcsetattr(std::io::stdin(), OptionalActions::Now, &modes).ok();
}

struct Keys {
    input: BufReader<File>,
    editor: Editor,
    /// Rows of the terminal between the first one of the text and the cursor.
    above: usize,
}

impl Keys {
    fn serve(mut self, asked: &Asked<()>, send: &Sender<Typed>) {
        while asked.recv().is_ok() {
            set(true);
            write("\x1b[?2004h");
            let typed = self.text();
            write("\x1b[?2004l");
            set(false);
            if send.blocking_send(typed).is_err() {
                return;
            }
        }
    }

    fn text(&mut self) -> Typed {
        self.above = 0;
        loop {
            // What was pasted or typed ahead is shown in one go.
            if self.input.buffer().is_empty() {
                let screen = self.editor.screen(PROMPT, columns());
                self.paint(&screen, true);
            }
            let Some(key) = self.key() else { return Typed::End };
            let shown = self.editor.screen(PROMPT, columns());
            match self.editor.press(key) {
                Step::On => continue,
                Step::Clear => {
                    write("\x1b[H\x1b[2J");
                    self.above = 0;
                    continue;
                }
                step => {
                    self.paint(&shown, false);
                    return match step {
                        Step::Run(text) => {
                            write("\r\n");
                            Typed::Text(text)
                        }
                        Step::Leave => {
                            write("\r\n");
                            Typed::End
                        }
                        _ => {
                            write("^C\r\n");
                            Typed::Interrupted
                        }
                    };
                }
            }
        }
    }

    /// Writes the text anew where it stands; the cursor is in it, or behind its end.
    fn paint(&mut self, screen: &Screen, in_text: bool) {
        let (rows, cursor) = (&screen.rows, screen.cursor);
        let lines = lines_of_terminal();
        // Of a text that is higher than the terminal, the part around the cursor.
        let room = lines.saturating_sub(1).max(1);
        let end = if in_text { (cursor.0 + 1).max(room.min(rows.len())) } else { rows.len() };
        let start = if in_text { end.saturating_sub(room) } else { 0 };
        let shown = &rows[start..end];
        let below = &screen.below[..screen.below.len().min(lines.saturating_sub(1 + shown.len()))];
        let mut out = String::from("\x1b[?25l\r");
        if self.above > 0 {
            out.push_str(&format!("\x1b[{}A", self.above));
        }
        out.push_str("\x1b[J");
        let all: Vec<&str> = match in_text {
            true => shown.iter().chain(below).map(String::as_str).collect(),
            false => shown.iter().map(String::as_str).collect(),
        };
        out.push_str(&all.join("\r\n"));
        if in_text {
            let up = all.len() - 1 - (cursor.0 - start);
            if up > 0 {
                out.push_str(&format!("\x1b[{up}A"));
            }
            out.push('\r');
            if cursor.1 > 0 {
                out.push_str(&format!("\x1b[{}C", cursor.1));
            }
        }
        out.push_str("\x1b[?25h");
        write(&out);
        self.above = cursor.0 - start.min(cursor.0);
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.input.read_exact(&mut byte).ok().map(|()| byte[0])
    }

    /// `None`: the terminal is gone.
    fn key(&mut self) -> Option<Key> {
        Some(match self.byte()? {
            b'\r' | b'\n' => Key::Enter,
            b'\t' => Key::Tab,
            0x7f | 0x08 => Key::Backspace,
            0x01 => Key::Home,
            0x02 => Key::Left,
            0x03 => Key::Interrupt,
            0x04 => Key::EndOfInput,
            0x05 => Key::End,
            0x06 => Key::Right,
            0x0b => Key::CutToEnd,
            0x0c => Key::Clear,
            0x0e => Key::Down,
            0x10 => Key::Up,
            0x12 => Key::Search,
            0x15 => Key::CutToStart,
            0x17 => Key::CutWordLeft,
            0x19 => Key::Yank,
            0x1b => self.escape()?,
            first @ 0x20.. => self.letter(first)?,
            _ => Key::Other,
        })
    }

    fn letter(&mut self, first: u8) -> Option<Key> {
        let length = match first {
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0.. => 4,
            _ => 1,
        };
        let mut bytes = vec![first];
        while bytes.len() < length {
            bytes.push(self.byte()?);
        }
        Some(String::from_utf8(bytes).map_or(Key::Other, Key::Text))
    }

    /// What follows ESC. Escape alone waits for the key after it, as Alt does.
    fn escape(&mut self) -> Option<Key> {
        Some(match self.byte()? {
            b'b' => Key::WordLeft,
            b'f' => Key::WordRight,
            b'd' => Key::CutWordRight,
            b'\r' | b'\n' => Key::NewLine,
            0x7f | 0x08 => Key::CutWordLeft,
            b'O' => named(self.byte()?, ""),
            b'[' => {
                let mut parameters = String::new();
                loop {
                    match self.byte()? {
                        last @ 0x40..=0x7e if last == b'~' && parameters == "200" => return self.pasted(),
                        last @ 0x40..=0x7e => break named(last, &parameters),
                        other => parameters.push(char::from(other)),
                    }
                }
            }
            _ => Key::Other,
        })
    }

    /// Until the end of what is pasted.
    fn pasted(&mut self) -> Option<Key> {
        const END: &[u8] = b"\x1b[201~";
        let mut bytes = Vec::new();
        while !bytes.ends_with(END) {
            bytes.push(self.byte()?);
        }
        bytes.truncate(bytes.len() - END.len());
        let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n").replace('\r', "\n");
        Some(Key::Text(text))
    }
}

/// The key of `ESC [ parameters last`.
fn named(last: u8, parameters: &str) -> Key {
    // With Ctrl or Alt.
    let by_word = parameters.ends_with(";5") || parameters.ends_with(";3");
    match (last, parameters) {
        (b'A', _) => Key::Up,
        (b'B', _) => Key::Down,
        (b'C', _) if by_word => Key::WordRight,
        (b'D', _) if by_word => Key::WordLeft,
        (b'C', _) => Key::Right,
        (b'D', _) => Key::Left,
        (b'H', _) | (b'~', "1" | "7") => Key::Home,
        (b'F', _) | (b'~', "4" | "8") => Key::End,
        (b'~', "3") => Key::Delete,
        _ => Key::Other,
    }
}

/// Lines of a terminal that cannot be drawn on.
fn lines(input: BufReader<File>, asked: &Asked<()>, send: &Sender<Typed>) {
    let mut lines = input.lines();
    while asked.recv().is_ok() {
        let mut text = String::new();
        let typed = loop {
            write(if text.is_empty() { PROMPT } else { MORE });
            let Some(Ok(line)) = lines.next() else { break Typed::End };
            text.push_str(&line);
            if is_complete(&text) {
                break Typed::Text(text);
            }
            text.push('\n');
        };
        if send.blocking_send(typed).is_err() {
            return;
        }
    }
}

fn columns() -> usize {
    size().0
}

fn lines_of_terminal() -> usize {
    size().1
}

/// Columns and lines.
fn size() -> (usize, usize) {
    let told = tcgetwinsize(std::io::stdin()).ok();
    let told = told.map(|size| (usize::from(size.ws_col), usize::from(size.ws_row)));
    told.filter(|(columns, lines)| *columns > 1 && *lines > 1).unwrap_or((80, 24))
}

/// To the terminal; nothing can be done if it is gone.
#[expect(clippy::disallowed_methods, reason = "cli prints")]
fn write(text: &str) {
    let mut out = std::io::stderr().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
}
