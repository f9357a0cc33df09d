//! What an error answer of the server asks for: trying again, waiting, or a person. Pure: text in, word out.
//!
//! | answer | means | so |
//! |---|---|---|
//! | LOADING, BUSY, TRYAGAIN, MASTERDOWN, CLUSTERDOWN, READONLY, NOSCRIPT | a state that ends, or another server by now | again at once, on a new connection |
//! | OOM, MISCONF, NOREPLICAS, too many clients | somebody makes room, or the server does | later |
//! | NOPERM, NOAUTH, WRONGPASS, DENIED | the user may not | stop |
//! | WRONGTYPE | another program's keys lie under the prefix | stop |
//! | MOVED, ASK, CROSSSLOT | a server that has become a node of a cluster ([`super::cluster`] heeds them before) | stop |
//! | unknown command | a server that cannot do it | stop |
//! | anything else | not known | later |
//!
//! An error inside a script carries the code of the command that failed: in front since Redis 7, before that behind the
//! words of the script's own error.

/// What to do about an error answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Ends by itself; a new connection may already lead to a server without it.
    Passing,
    /// Ends when there is room again: trying at once is of no use.
    Full,
    /// The user may not do this.
    Denied,
    /// A key holds something else than a hash.
    WrongType,
    /// The server has become a node of a cluster.
    Cluster,
    /// The server does not know a command.
    Unfit,
    /// No answer that is known.
    Other,
}

impl Fault {
    pub(super) fn of(error: &str) -> Self {
        match code(error) {
            "LOADING" | "BUSY" | "TRYAGAIN" | "MASTERDOWN" | "CLUSTERDOWN" | "READONLY" | "NOSCRIPT" => {
                Self::Passing
            }
            "OOM" | "MISCONF" | "NOREPLICAS" => Self::Full,
            "NOPERM" | "NOAUTH" | "WRONGPASS" | "DENIED" => Self::Denied,
            "WRONGTYPE" => Self::WrongType,
            "MOVED" | "ASK" | "CROSSSLOT" => Self::Cluster,
            _ => Self::of_words(error),
        }
    }

    /// By the words, where the code is that of any error.
    fn of_words(error: &str) -> Self {
        let has = |words: &str| error.contains(words);
        if has("max number of clients") {
            Self::Full
        } else if has("ACL failure") || has("can't run this command") {
            Self::Denied
        } else if has("unknown command") || has("Unknown Redis command") {
            Self::Unfit
        } else {
            Self::Other
        }
    }

    /// Nothing changes until a person has acted.
    pub(super) fn lasts(self) -> bool {
        matches!(self, Self::Denied | Self::WrongType | Self::Cluster | Self::Unfit)
    }

    /// The same of an answer to a log-in, where an error that is not known is one of user, password or database.
    pub(super) fn lasts_at_log_in(self) -> bool {
        self.lasts() || self == Self::Other
    }
}

/// The code of an error: its first word, or that of the command that failed in a script.
fn code(error: &str) -> &str {
    let inner = match error.strip_prefix("ERR Error running script") {
        Some(rest) => rest.split_once(": -").map_or(error, |(_, inner)| inner),
        None => error,
    };
    inner.split(' ').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Redis 6.2 and 7.0 print them.
    #[test]
    fn every_answer_has_its_meaning() {
        let known = [
            ("LOADING Redis is loading the dataset in memory", Fault::Passing),
            ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or …", Fault::Passing),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Fault::Passing),
            (
                "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
                Fault::Passing,
            ),
            ("CLUSTERDOWN The cluster is down", Fault::Passing),
            (
                "READONLY You can't write against a read only replica. script: 5ca1, on @user_script:20.",
                Fault::Passing,
            ),
            ("NOSCRIPT No matching script. Please use EVAL.", Fault::Passing),
            (
                "OOM command not allowed when used memory > 'maxmemory'. script: 5ca1, on @user_script:20.",
                Fault::Full,
            ),
            (
                "ERR Error running script (call to f_5ca1): @user_script:20: -OOM command not allowed when used memory > \
                 'maxmemory'.",
                Fault::Full,
            ),
            (
                "ERR Error running script (call to f_5ca1): @user_script:20: -READONLY You can't write against a read only \
                 replica.",
                Fault::Passing,
            ),
            (
                "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to …",
                Fault::Full,
            ),
            ("NOREPLICAS Not enough good replicas to write.", Fault::Full),
            ("ERR max number of clients reached", Fault::Full),
            ("NOPERM this user has no permissions to run the 'evalsha' command", Fault::Denied),
            ("NOAUTH Authentication required.", Fault::Denied),
            ("WRONGPASS invalid username-password pair or user is disabled.", Fault::Denied),
            ("DENIED Redis is running in protected mode because …", Fault::Denied),
            (
                "ERR ACL failure in script: User features has no permissions to run the 'hset' command",
                Fault::Denied,
            ),
            (
                "ERR The user executing the script can't run this command or subcommand script: 5ca1",
                Fault::Denied,
            ),
            (
                "WRONGTYPE Operation against a key holding the wrong kind of value script: 5ca1, on @user_script:37.",
                Fault::WrongType,
            ),
            ("MOVED 3999 127.0.0.1:6381", Fault::Cluster),
            ("ASK 3999 127.0.0.1:6381", Fault::Cluster),
            ("CROSSSLOT Keys in request don't hash to the same slot", Fault::Cluster),
            ("ERR unknown command 'EVALSHA', with args beginning with: …", Fault::Unfit),
            ("ERR something of a later version", Fault::Other),
            ("", Fault::Other),
        ];
        for (error, fault) in known {
            assert_eq!(Fault::of(error), fault, "{error}");
        }
    }

    #[test]
    fn what_stops_a_pipeline() {
        let lasting = [Fault::Denied, Fault::WrongType, Fault::Cluster, Fault::Unfit];
        for fault in [Fault::Passing, Fault::Full, Fault::Other].into_iter().chain(lasting) {
            assert_eq!(fault.lasts(), lasting.contains(&fault), "{fault:?}");
        }
        // A wrong database, or a password where the server has none.
        assert!(Fault::of("ERR DB index is out of range").lasts_at_log_in());
        assert!(!Fault::of("ERR max number of clients reached").lasts_at_log_in());
    }
}
