//! What a tenant may do.

use crate::gcra::Rate;

/// The limits of one tenant; `None` is no limit. Fields have the names of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Requests a minute.
    pub rpm: Option<Rate>,
    /// Prompt tokens a minute.
    pub input_tpm: Option<Rate>,
    /// Generated tokens a minute.
    pub output_tpm: Option<Rate>,
    /// Answers in flight: every choice of every prompt counts.
    pub concurrency: Option<u32>,
    /// Those of them that wait to be scheduled.
    pub queued: Option<u32>,
    /// Prompt tokens of those.
    pub queued_tokens: Option<u64>,
    /// Tokens of one answer.
    pub max_tokens: Option<u32>,
    /// Tokens of one prompt.
    pub max_input_tokens: Option<u32>,
    /// Choices of one request.
    pub n: Option<u32>,
    /// Part of the KV pool that its running sequences may hold together, in (0, 1].
    pub kv_blocks_share: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rpm: None,
            input_tpm: None,
            output_tpm: None,
            concurrency: None,
            queued: None,
            queued_tokens: None,
            max_tokens: None,
            max_input_tokens: None,
            n: None,
            kv_blocks_share: 1.0,
        }
    }
}

/// Defines a set of words that errors, labels and the file share.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),*
        }

        impl $name {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// As the file and the labels of metrics call it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(crate) use words;

words! {
    /// A limit that passes with time.
    Quota {
        /// Requests a minute.
        Rpm = "rpm",
        /// Prompt tokens a minute.
        InputTpm = "input_tpm",
        /// Generated tokens a minute.
        OutputTpm = "output_tpm",
        /// Answers in flight.
        Concurrency = "concurrency",
        /// Answers that wait.
        Queued = "queued",
        /// Prompt tokens that wait.
        QueuedTokens = "queued_tokens",
        /// Tokens of a day, a week or a month.
        Budget = "budget",
    }
}

words! {
    /// What a key is for.
    Scope {
        /// Generate text.
        Infer = "infer",
        /// Turn text into tokens and back.
        Tokenize = "tokenize",
        /// Read the metrics page, which shows every tenant.
        Metrics = "metrics",
        /// Everything, other tenants' requests too.
        Admin = "admin",
    }
}

/// A set of [`Scope`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// Of `--api-key`, and of everybody where no key is needed.
    pub const ALL: Self = Self(u8::MAX);

    /// Of a key that names none: to infer and to tokenize.
    pub fn standard() -> Self {
        Self::of(&[Scope::Infer, Scope::Tokenize])
    }

    /// These.
    pub fn of(scopes: &[Scope]) -> Self {
        Self(scopes.iter().fold(0, |bits, &scope| bits | 1 << scope as u8))
    }

    /// Whether a key may do this; `admin` may do everything.
    pub fn allow(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8 | 1 << Scope::Admin as u8) != 0
    }
}

/// Who shares cached prefixes with whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The keys of one tenant share.
    #[default]
    Tenant,
    /// Every key is alone.
    Key,
    /// All tenants of a group share.
    Shared(String),
    /// Shares with everybody else who says `none`.
    None,
}

impl Isolation {
    /// The name of the namespace. Parts are set off by a byte that no id holds.
    pub(crate) fn namespace(&self, tenant: &str, key: &str) -> Vec<u8> {
        match self {
            Self::Tenant => format!("tenant\0{tenant}"),
            Self::Key => format!("key\0{tenant}\0{key}"),
            Self::Shared(group) => format!("shared\0{group}"),
            Self::None => "none".to_owned(),
        }
        .into_bytes()
    }
}

/// A pattern of model names, in which `*` stands for any characters, `/` too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(pub(crate) String);

impl Glob {
    /// Whether it means this name.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // Taking the first place for each part leaves the most for those that follow.
        for part in parts {
            let Some((_, after)) = rest.split_once(part) else { return false };
            rest = after;
        }
        rest.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (pattern, yes, no) in [
            ("llama", &["llama"][..], &["llama-3", "a-llama", ""][..]),
            ("llama-*", &["llama-", "llama-3/x"], &["llama", "xllama-3"]),
            ("*", &["", "anything/at-all"], &[]),
            ("a*b*c", &["abc", "a-b-b-c", "abbc"], &["ab", "acb", "abcd"]),
            ("*-ab-ab", &["x-ab-ab", "-ab-ab-ab"], &["-ab", "x-ab"]),
            ("org/*", &["org/model"], &["org", "other/org/model"]),
        ] {
            let glob = Glob(pattern.into());
            yes.iter().for_each(|name| assert!(glob.matches(name), "{pattern} {name}"));
            no.iter().for_each(|name| assert!(!glob.matches(name), "{pattern} {name}"));
        }
    }

    #[test]
    fn admin_may_do_everything_and_others_what_they_may() {
        let admin = Scopes::of(&[Scope::Admin]);
        Scope::ALL.iter().for_each(|&scope| assert!(admin.allow(scope) && Scopes::ALL.allow(scope)));
        assert!(Scopes::standard().allow(Scope::Infer) && Scopes::standard().allow(Scope::Tokenize));
        assert!(!Scopes::standard().allow(Scope::Metrics) && !Scopes::standard().allow(Scope::Admin));
        assert!(!Scopes::of(&[]).allow(Scope::Infer));
    }

    #[test]
    fn namespaces_differ_where_they_must() {
        let all = [
            Isolation::Tenant.namespace("a", "k"),
            Isolation::Tenant.namespace("b", "k"),
            Isolation::Key.namespace("a", "k"),
            Isolation::Key.namespace("a", "l"),
            Isolation::Shared("a".into()).namespace("a", "k"),
            Isolation::None.namespace("a", "k"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| other != one));
        }
        assert_eq!(Isolation::Tenant.namespace("a", "k"), Isolation::Tenant.namespace("a", "l"));
        let shared = Isolation::Shared("g".into());
        assert_eq!(shared.namespace("a", "k"), shared.namespace("b", "l"));
        assert_eq!(Isolation::None.namespace("a", "k"), Isolation::None.namespace("b", "l"));
    }
}
