//! Three sources of settings, lowest first: a TOML file, `QUIRE_*` environment variables, flags.
//!
//! The lower two are turned into flags in front of the user's own, and a later flag overrides an earlier one. So each
//! source is read by the same parser, and a setting cannot exist in one of them only.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::cli::Cli;

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// From the command line (also the texts of `--help` and `--version`).
    #[error(transparent)]
    Cli(#[from] clap::Error),
    /// The file cannot be read.
    #[error("--config {path}: {message}")]
    File {
        /// As given.
        path: String,
        /// What the system or the TOML parser said.
        message: String,
    },
    /// The file has a key that no flag has.
    #[error("{path}: unknown key `{key}`; keys are the names of the flags in `quire serve --help`{hint}")]
    UnknownKey {
        /// The file.
        path: String,
        /// The key.
        key: String,
        /// The closest known key, if one is close.
        hint: String,
    },
    /// A value does not fit its setting.
    #[error("{origin}: {message}")]
    Value {
        /// File and key, or the variable's name.
        origin: String,
        /// What is wrong with it.
        message: String,
    },
}

/// The command to run, and what to warn about once logging works.
#[derive(Debug)]
pub struct Parsed {
    /// The command with the settings of all sources.
    pub cli: Cli,
    /// What `serve` runs with, by the id of the flag, defaults included; empty for other commands. Secrets are not masked.
    pub settings: BTreeMap<String, String>,
    /// One sentence each.
    pub warnings: Vec<String>,
}

/// A value from the file or the environment.
struct Setting {
    value: String,
    origin: String,
}

/// Settings by the id of their flag.
type Settings = BTreeMap<String, Setting>;

/// Reads `argv` (with the program's name), and for commands that take settings the file and `env` beneath it.
///
/// # Errors
/// The first setting that is unknown or has a wrong value; the message names its source.
pub fn parse(
    argv: &[OsString],
    env: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Parsed, LayerError> {
    let matches = Cli::command().try_get_matches_from(argv)?;
    let (command, given) = innermost(&matches);
    if given.try_contains_id("config").is_err() {
        return Ok(Parsed {
            cli: Cli::from_arg_matches(&matches)?,
            settings: BTreeMap::new(),
            warnings: Vec::new(),
        });
    }
    let mut warnings = Vec::new();
    let known = flags_of(&["serve"]);
    let from_env = read_env(env, &known, &mut warnings);
    let config = given.get_one::<std::path::PathBuf>("config").cloned();
    let config = config.or_else(|| from_env.get("config").map(|setting| setting.value.clone().into()));
    let mut settings = config.map(|path| read_file(&path, &known)).transpose()?.unwrap_or_default();
    settings.extend(from_env);
    let lower = as_flags(&settings, &command, given)?;
    // Only the commands' names come before the flags of the innermost one.
    let (names, rest) = argv.split_at((1 + command.len()).min(argv.len()));
    let merged = [names, &lower, rest].concat();
    let matches = Cli::command().try_get_matches_from(merged)?;
    let (command, own) = innermost(&matches);
    let effective = if command == ["serve"] { effective(own, &known) } else { BTreeMap::new() };
    Ok(Parsed { cli: Cli::from_arg_matches(&matches)?, settings: effective, warnings })
}

/// The last value of each setting that has one: a later flag overrides an earlier one.
fn effective(matches: &ArgMatches, ids: &[String]) -> BTreeMap<String, String> {
    let value = |id: &String| {
        let mut values = matches.try_get_raw(id).ok().flatten()?;
        Some((id.clone(), values.next_back()?.to_string_lossy().into_owned()))
    };
    ids.iter().filter_map(value).collect()
}

/// The command that was given, as `["bench", "latency"]`, and its own arguments.
fn innermost(mut matches: &ArgMatches) -> (Vec<&str>, &ArgMatches) {
    let mut command = Vec::new();
    while let Some((name, inner)) = matches.subcommand() {
        command.push(name);
        matches = inner;
    }
    (command, matches)
}

/// Ids of a command's settings; an id is the flag's name with `_` for `-`.
fn flags_of(command: &[&str]) -> Vec<String> {
    let cli = Cli::command();
    let find = |parent, name: &&str| clap::Command::find_subcommand(parent, name);
    let command = command.iter().try_fold(&cli, find);
    let command = command.expect("the command exists: it was parsed, or named literally");
    command.get_arguments().map(|arg| arg.get_id().to_string()).collect()
}

/// The settings this command has and the user did not give, as flags; each is tried alone first, to blame its source.
fn as_flags(settings: &Settings, command: &[&str], given: &ArgMatches) -> Result<Vec<OsString>, LayerError> {
    let mut flags = Vec::new();
    let serve = flags_of(&["serve"]);
    let own = flags_of(command);
    for (id, setting) in settings {
        let flag: OsString = match id.as_str() {
            "model" => setting.value.clone().into(),
            id => format!("--{}={}", id.replace('_', "-"), setting.value).into(),
        };
        debug_assert!(serve.contains(id), "sources yield known settings only");
        let alone = [OsStr::new("quire"), OsStr::new("serve"), &flag];
        Cli::command()
            .try_get_matches_from(alone)
            .map_err(|error| LayerError::Value { origin: setting.origin.clone(), message: reason(&error) })?;
        let overridden = own.contains(id) && given.value_source(id) == Some(ValueSource::CommandLine);
        if own.contains(id) && !overridden {
            flags.push(flag);
        }
    }
    Ok(flags)
}

/// What clap says, without its usage text: the first paragraph, with the possible values if there is a set of them.
fn reason(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    paragraph.join(" ").trim_start_matches("error: ").to_owned()
}

/// The file's keys, where `max-num-seqs` may also be written `max_num_seqs`.
fn read_file(path: &Path, known: &[String]) -> Result<Settings, LayerError> {
    let shown = path.display().to_string();
    let fail = |message: String| LayerError::File { path: shown.clone(), message };
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| fail(error.to_string()))?;
    let mut settings = Settings::new();
    for (key, value) in table {
        let id = key.replace('-', "_");
        if !known.contains(&id) || id == "config" {
            return Err(LayerError::UnknownKey { path: shown, hint: closest(&id, known), key });
        }
        let origin = format!("{shown}: `{key}`");
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(flag) => flag.to_string(),
            // Of strings, for a flag that takes several.
            toml::Value::Array(list) if list.iter().all(toml::Value::is_str) => {
                list.iter().filter_map(toml::Value::as_str).collect::<Vec<_>>().join(",")
            }
            other => {
                let message = format!(
                    "must be a string, number, boolean or list of strings, not a {}",
                    other.type_str()
                );
                return Err(LayerError::Value { origin, message });
            }
        };
        if settings.insert(id, Setting { value, origin: origin.clone() }).is_some() {
            return Err(LayerError::Value { origin, message: "is given twice".into() });
        }
    }
    Ok(settings)
}

fn closest(id: &str, known: &[String]) -> String {
    let shared = |other: &&String| id.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    match known.iter().max_by_key(shared) {
        Some(other) if shared(&other) >= 4 => format!(" (did you mean `{other}`?)"),
        _ => String::new(),
    }
}

/// `QUIRE_*` variables. Empty ones count as unset; unknown ones are worth a warning, as they may be meant for others.
fn read_env(
    env: impl Iterator<Item = (OsString, OsString)>,
    known: &[String],
    warnings: &mut Vec<String>,
) -> Settings {
    let mut settings = Settings::new();
    for (name, value) in env {
        let Some(name) = name.to_str().filter(|name| name.starts_with("QUIRE_")) else { continue };
        let Some(value) = value.to_str() else {
            warnings.push(format!("the environment variable {name} is not valid UTF-8 and is ignored"));
            continue;
        };
        if value.is_empty() || matches!(name, "QUIRE_LOG" | "QUIRE_KERNELS") || is_service_link(name, value) {
            continue;
        }
        let id = name["QUIRE_".len()..].to_ascii_lowercase();
        if known.contains(&id) {
            settings.insert(id, Setting { value: value.to_owned(), origin: name.to_owned() });
        } else {
            warnings
                .push(format!("the environment variable {name} is not a setting of Quire and is ignored"));
        }
    }
    settings
}

/// Whether Kubernetes injected the variable for a Service whose name begins with `quire`: `QUIRE_PORT=tcp://…`,
/// `QUIRE_SERVICE_HOST`, `QUIRE_PORT_8000_TCP_ADDR` and the like.
fn is_service_link(name: &str, value: &str) -> bool {
    let port_with_protocol = name.split_once("_PORT_").is_some_and(|(_, rest)| {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        digits > 0 && ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| rest[digits..].starts_with(protocol))
    });
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
        || name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || port_with_protocol
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::cli::{Command, ServeArgs};

    fn run(line: &str, env: &[(&str, &str)]) -> Result<(ServeArgs, Vec<String>), LayerError> {
        let argv: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
        let env = env.iter().map(|&(name, value)| (name.into(), value.into()));
        let parsed = parse(&argv, env)?;
        match parsed.cli.command {
            Command::Serve(args) => Ok((*args, parsed.warnings)),
            other => panic!("expected serve, got {other:?}"),
        }
    }

    fn file(name: &str, text: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("quire-layers-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn lists_come_from_every_source_and_the_highest_replaces_the_others() {
        let names = |line: &str, env: &[(&str, &str)]| {
            let (args, _) = run(line, env).unwrap();
            args.server.lora_modules.iter().map(|module| module.name.clone()).collect::<Vec<_>>().join(" ")
        };
        let path = file("list", "lora_modules = ['a=/a', 'b=/b']");
        let with_file = format!("quire serve --config {}", path.display());
        assert_eq!(names(&with_file, &[]), "a b");
        assert_eq!(names(&with_file, &[("QUIRE_LORA_MODULES", "c=/c,d=/d")]), "c d");
        let line = format!("{with_file} --lora-modules e=/e f=/f --lora-modules g=/g,h=/h");
        assert_eq!(names(&line, &[("QUIRE_LORA_MODULES", "c=/c")]), "e f g h");
        let error = run("quire serve", &[("QUIRE_LORA_MODULES", "c")]).unwrap_err().to_string();
        assert!(error.contains("QUIRE_LORA_MODULES") && error.contains("NAME=PATH"), "{error}");
    }

    #[test]
    fn file_then_environment_then_flags() {
        let path = file(
            "order",
            "model = 'from-file'\nport = 1\ngrpc-port = 2\nmax_num_seqs = 3\nno_prefix_cache = true",
        );
        let line = format!("quire serve --config {} --port 9", path.display());
        let env = [("QUIRE_PORT", "8"), ("QUIRE_GRPC_PORT", "8"), ("QUIRE_HOST", "0.0.0.0")];
        let (args, warnings) = run(&line, &env).unwrap();
        assert_eq!(args.server.port, 9, "flag over environment over file");
        let argv: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
        let env = env.iter().map(|&(name, value)| (name.into(), value.into()));
        let settings = parse(&argv, env).unwrap().settings;
        let shown = ["port", "grpc_port", "max_num_seqs", "quota_store"].map(|id| settings[id].as_str());
        assert_eq!(shown, ["9", "8", "3", "memory"]);
        assert_eq!(args.server.grpc_port, 8, "environment over file");
        assert_eq!(args.engine.max_num_seqs, Some(3), "file over default");
        assert_eq!(args.engine.model.as_deref(), Some("from-file"));
        assert!(args.engine.no_prefix_cache);
        assert_eq!(args.server.host.to_string(), "0.0.0.0");
        assert!(warnings.is_empty());

        let (args, _) =
            run(&format!("{line} from-cli --no-prefix-cache=false"), &[("QUIRE_MODEL", "from-env")]).unwrap();
        assert_eq!(args.engine.model.as_deref(), Some("from-cli"));
        assert!(!args.engine.no_prefix_cache);
        let (args, _) = run(&line, &[("QUIRE_MODEL", "from-env")]).unwrap();
        assert_eq!(args.engine.model.as_deref(), Some("from-env"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_environment_can_name_the_file() {
        let path = file("env", "port = 77");
        let (args, _) = run("quire serve", &[("QUIRE_CONFIG", path.to_str().unwrap())]).unwrap();
        assert_eq!(args.server.port, 77);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn mistakes_name_their_source() {
        let fail = |toml: &str, env: &[(&str, &str)]| {
            let path = file("bad", toml);
            let error =
                run(&format!("quire serve --config {}", path.display()), env).unwrap_err().to_string();
            std::fs::remove_file(path).unwrap();
            error
        };
        let unknown = fail("max_num_sequences = 3", &[]);
        assert!(unknown.contains("max_num_sequences") && unknown.contains("max_num_seqs"), "{unknown}");
        assert!(fail("port = 70000", &[]).contains("`port`: invalid value '70000'"));
        assert!(fail("port = [1]", &[]).contains("not a array"));
        assert!(fail("port = 1\nport = 2", &[]).contains("duplicate"));
        assert!(fail("max_num_seqs = 1\nmax-num-seqs = 2", &[]).contains("twice"));
        let dtype = fail("", &[("QUIRE_DTYPE", "f64")]);
        assert!(dtype.contains("QUIRE_DTYPE: invalid value 'f64'") && dtype.contains("bf16"), "{dtype}");
        assert!(
            run("quire serve --config /nonexistent.toml", &[])
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }

    #[test]
    fn variables_of_others() {
        let links = [
            ("QUIRE_PORT", "tcp://10.0.0.1:8000"),
            ("QUIRE_SERVICE_HOST", "10.0.0.1"),
            ("QUIRE_SERVICE_PORT", "8000"),
            ("QUIRE_SERVICE_PORT_HTTP", "8000"),
            ("QUIRE_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
            ("QUIRE_PORT_8000_TCP_PROTO", "tcp"),
            ("QUIRE_PORT_8000_TCP_PORT", "8000"),
            ("QUIRE_HOST", ""),
            ("PATH", "/bin"),
        ];
        let (args, warnings) = run("quire serve", &links).unwrap();
        assert_eq!(args.server.port, 8000);
        assert!(warnings.is_empty(), "{warnings:?}");
        let (_, warnings) = run("quire serve", &[("QUIRE_PROT", "1")]).unwrap();
        assert!(warnings.len() == 1 && warnings[0].contains("QUIRE_PROT"), "{warnings:?}");
    }

    #[test]
    fn commands_share_the_file() {
        let path = file("shared", "port = 1\ndtype = 'f32'");
        let argv: Vec<OsString> =
            ["quire", "run", "--config", path.to_str().unwrap()].iter().map(Into::into).collect();
        let Command::Run(args) = parse(&argv, std::iter::empty()).unwrap().cli.command else {
            panic!("not run")
        };
        assert_eq!(args.engine.dtype, crate::args::DTypeArg::F32);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn so_do_the_measurements_of_a_model() {
        use crate::bench::args::BenchCommand;
        let path = file("bench", "port = 1\nthreads = 3\ndtype = 'f32'");
        let line = format!("quire bench latency --dtype bf16 --config {} some-model", path.display());
        let argv: Vec<OsString> = line.split(' ').map(Into::into).collect();
        let env = [("QUIRE_BLOCK_SIZE".into(), "32".into())];
        let Command::Bench(bench) = parse(&argv, env.into_iter()).unwrap().cli.command else {
            panic!("not bench")
        };
        let BenchCommand::Latency(args) = bench.command else { panic!("not latency") };
        let engine = &args.model.engine;
        assert_eq!(
            (engine.threads, engine.block_size, engine.model.as_deref()),
            (Some(3), 32, Some("some-model"))
        );
        assert_eq!(engine.dtype, crate::args::DTypeArg::Bf16, "flag over file");
        std::fs::remove_file(path).unwrap();
    }
}
