//! Who we are to the brokers, and what their refusals mean.
//!
//! - **Log-in**: a refused user or password never passes by itself. It is an error at the start, and at run time as
//!   soon as a broker says so: waiting would look like a broker that is down.
//! - **Topics**: reading or writing without the right is an error, at the start if the broker tells by then (it tells
//!   who may not even see the topic), else with the first record.
//! - **Groups**: positions are ours, so a group's right is needed for nothing but showing them. A refusal is warned
//!   about once, and reading goes on.
//! - **TLS**: a certificate that does not fit is an error at the start; at run time it is an outage like others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rdkafka::types::RDKafkaErrorCode;

use super::config::KafkaSettings;
use crate::error::Error;

/// What a user may be refused on a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    Read,
    Write,
    Create,
}

impl Right {
    /// As a sentence says it, and as Kafka's ACLs call it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Read => ("read", "Read"),
            Self::Write => ("write to", "Write"),
            Self::Create => ("create", "Create"),
        }
    }
}

/// Who talks to whom, for messages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    pub servers: String,
    topic: String,
    /// `None`: nobody logs in.
    user: Option<String>,
    group: Option<Arc<str>>,
    /// The group's refusal was warned about; shared by all clients of a source.
    warned: Arc<AtomicBool>,
}

impl Access {
    pub fn new(settings: &KafkaSettings, topic: &str) -> Self {
        let (servers, user) = (settings.bootstrap_servers.clone(), settings.user());
        Self { servers, topic: topic.to_owned(), user, ..Self::default() }
    }

    /// For a source: where it commits offsets to.
    pub fn with_group(mut self, group: Arc<str>) -> Self {
        self.group = Some(group);
        self
    }

    fn user(&self) -> String {
        self.user.as_ref().map_or_else(|| "a user without log-in".to_owned(), |user| format!("user {user}"))
    }

    /// A broker does not take user, password or mechanism.
    pub fn log_in_refused(&self, reason: &str) -> Error {
        let Self { servers, topic, .. } = self;
        let hint = if reason.contains("not valid in current SASL state") {
            "This address takes no log-in: use the one that does, or leave kafka.security.protocol out."
        } else if reason.contains("Unsupported SASL mechanism") {
            "Set kafka.sasl.mechanism to one that the broker supports."
        } else {
            "Check kafka.sasl.username, kafka.sasl.password and kafka.sasl.mechanism."
        };
        Error::external(format!(
            "topic {topic}: {} cannot log in to kafka at {servers}: {}",
            self.user(),
            brief(reason)
        ))
        .hint(hint)
    }

    /// A broker's certificate does not fit.
    pub fn certificate_refused(&self) -> Error {
        let Self { servers, topic, .. } = self;
        Error::external(format!(
            "topic {topic}: no TLS connection to kafka at {servers}: its certificate is signed by nobody that is trusted, \
             or for another host"
        ))
        .hint(
            "Set kafka.ssl.ca.location to the certificate (PEM) of the authority that signed the brokers' certificates, \
             and use the host name that is in them.",
        )
    }

    /// The user lacks a right on the topic.
    pub fn right_refused(&self, right: Right) -> Error {
        let Self { servers, topic, .. } = self;
        let (verb, operation) = right.words();
        let error = Error::external(format!("{} may not {verb} topic {topic} at {servers}", self.user()));
        error.hint(match &self.user {
            Some(user) => format!(
                "Use the user of this job, or grant the right: kafka-acls.sh --bootstrap-server {servers} --add \
                 --allow-principal User:{user} --operation {operation} --topic {topic}"
            ),
            None => "Log in: set kafka.security.protocol, kafka.sasl.mechanism, kafka.sasl.username and \
                     kafka.sasl.password."
                .to_owned(),
        })
    }

    /// What a refusal by code means; `None` for other errors.
    pub fn refusal(&self, code: RDKafkaErrorCode, reason: &str, right: Right) -> Option<Error> {
        match code {
            RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed => {
                Some(self.right_refused(right))
            }
            RDKafkaErrorCode::SaslAuthenticationFailed => Some(self.log_in_refused(reason)),
            RDKafkaErrorCode::Authentication if is_answer(reason) => Some(self.log_in_refused(reason)),
            _ => None,
        }
    }

    /// Whether the group was refused: offsets that are committed then wait for a coordinator that never comes, and hold
    /// up the end.
    pub fn is_group_refused(&self) -> bool {
        self.warned.load(Ordering::Relaxed)
    }

    /// The user may not use the group: said once, as nothing but lag tools needs it.
    pub fn group_refused(&self) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            let group = self.group.as_deref().unwrap_or_default();
            tracing::warn!(
                topic = self.topic,
                group,
                "{} may not use the group {group}: its offsets are not committed, so lag tools do not see them; \
                 reading goes on (allow Read on the group, or set group_id to one that is allowed)",
                self.user()
            );
        }
    }
}

/// Whether a broker has answered a log-in with no. A connection that breaks during the log-in has the same code.
pub(super) fn is_answer(reason: &str) -> bool {
    !reason.contains("Local: ") && !reason.contains("hung up")
}

/// Whether the connection failed on a broker's certificate. The code differs by the moment in which it failed.
pub(super) fn is_certificate(reason: &str) -> bool {
    reason.contains("certificate verify failed")
}

/// What librdkafka says, in one line and without what only repeats: `sasl_ssl://host:1/bootstrap: text (after 3ms in
/// state X)` becomes `text`. A plain connection has no `sasl_ssl://`.
pub(super) fn brief(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default().trim();
    let line = line.rsplit_once("]: ").map_or(line, |(_, text)| text);
    let text = match line.split_once(": ") {
        Some((origin, text)) if origin.contains('/') && !origin.contains(' ') => text,
        _ => line,
    };
    let text = text.split(" (after ").next().unwrap_or(text);
    text.trim_end_matches([' ', ':']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_is_no_refusal() {
        let settings = KafkaSettings { bootstrap_servers: "h:1".to_owned(), ..KafkaSettings::default() };
        let access = Access::new(&settings, "t");
        let broken =
            "SASL PLAIN mechanism handshake failed: Local: Broker transport failure: broker's mechanisms: ";
        let code = RDKafkaErrorCode::Authentication;
        assert!(access.refusal(code, broken, Right::Read).is_none());
        let refused = access.refusal(code, "SASL authentication error: no", Right::Read).unwrap();
        let message =
            "topic t: a user without log-in cannot log in to kafka at h:1: SASL authentication error: no";
        assert_eq!(refused.message(), message);
        let refused = access.refusal(RDKafkaErrorCode::TopicAuthorizationFailed, "", Right::Create).unwrap();
        assert_eq!(refused.message(), "a user without log-in may not create topic t at h:1");
        assert!(refused.hint_text().unwrap().starts_with("Log in: "));
    }

    #[test]
    fn reasons_lose_what_only_repeats() {
        let cases = [
            ("sasl_ssl://h:1/bootstrap: SASL error: no (after 3ms in state AUTH_REQ)", "SASL error: no"),
            ("[thrd:ssl://h:1/boot]: ssl://h:1/boot: SSL: gone: maybe?\nmore", "SSL: gone: maybe?"),
            (
                "h:1/bootstrap: Send failed: Broken pipe (after 1ms in state UP) (_TRANSPORT)",
                "Send failed: Broken pipe",
            ),
            (
                "Connect to ipv4#127.0.0.1:9 failed: Connection refused",
                "Connect to ipv4#127.0.0.1:9 failed: Connection refused",
            ),
            ("supported mechanisms: ", "supported mechanisms"),
        ];
        for (reason, expected) in cases {
            assert_eq!(brief(reason), expected);
        }
    }
}
