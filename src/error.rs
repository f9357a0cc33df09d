//! The one error of the crate: who must act ([`Domain`]), what happened, and what to do next.
//!
//! `message` is lowercase without a full stop and says what happened and where; `hint` is a full sentence that
//! says what to do next. An error that comes from SQL text also carries its [`Place`], which the command line
//! renders as the line with a caret.

use std::fmt;
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who must act; decides the exit code of the process (DESIGN §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// The SQL, an option or an argument is wrong: exit code 2.
    User,
    /// A broker, store or disk failed or is missing: exit code 3.
    External,
    /// Another process has taken this pipeline over; this one must write nothing more: exit code 3.
    Fenced,
    /// A broken invariant of our own: exit code 3, and worth a bug report.
    Internal,
}

/// A position in a SQL text, 1-based.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// File path as the user gave it, or `<command line>`.
    pub file: Arc<str>,
    /// The whole text of that file.
    pub text: Arc<str>,
    pub line: usize,
    pub column: usize,
    /// Characters to underline, at least 1.
    pub width: usize,
}

#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    domain: Domain,
    message: String,
    hint: Option<String>,
    place: Option<Place>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    lasting: bool,
}

impl Error {
    pub fn new(domain: Domain, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(Box::new(Inner { domain, message, hint: None, place: None, source: None, lasting: false }))
    }

    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Domain::User, message)
    }

    pub fn external(message: impl Into<String>) -> Self {
        Self::new(Domain::External, message)
    }

    pub fn fenced(message: impl Into<String>) -> Self {
        Self::new(Domain::Fenced, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Domain::Internal, message)
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Sets the place unless a more precise one is already there.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.0.place.get_or_insert(place);
        self
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says that trying again changes nothing until a person has acted, as with a refused user.
    #[must_use]
    pub fn lasting(mut self) -> Self {
        self.0.lasting = true;
        self
    }

    /// Puts what was being done in front of the message.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }

    pub fn domain(&self) -> Domain {
        self.0.domain
    }

    /// Whether whoever rides out failures should stop instead.
    pub fn is_lasting(&self) -> bool {
        self.0.lasting
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    pub fn place(&self) -> Option<&Place> {
        self.0.place.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<datafusion::error::DataFusionError> for Error {
    fn from(error: datafusion::error::DataFusionError) -> Self {
        let error = match error {
            datafusion::error::DataFusionError::External(inner) => match inner.downcast::<Error>() {
                Ok(ours) => return *ours,
                Err(inner) => datafusion::error::DataFusionError::External(inner),
            },
            other => other,
        };
        Self::user(error.strip_backtrace())
    }
}

impl From<arrow::error::ArrowError> for Error {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::internal(error.to_string())
    }
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        Self::external("the object store failed").because(error)
    }
}

impl From<parquet::errors::ParquetError> for Error {
    fn from(error: parquet::errors::ParquetError) -> Self {
        Self::external("a Parquet file cannot be read or written").because(error)
    }
}

impl From<Error> for datafusion::error::DataFusionError {
    fn from(error: Error) -> Self {
        Self::External(Box::new(error))
    }
}
