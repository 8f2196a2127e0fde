//! `quire serve` a second time: packed weights come from the file that the first time left.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::Server;

/// The demo model as a directory, and an empty cache folder.
struct Scene {
    root: PathBuf,
}

impl Scene {
    fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("quire-prepack-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let model = root.join("model");
        fs::create_dir_all(&model).unwrap();
        fs::write(model.join("config.json"), quire_demo_model::CONFIG_JSON).unwrap();
        fs::write(model.join("tokenizer.json"), quire_demo_model::TOKENIZER_JSON).unwrap();
        fs::write(model.join("tokenizer_config.json"), quire_demo_model::TOKENIZER_CONFIG_JSON).unwrap();
        fs::write(model.join("model.safetensors"), quire_demo_model::WEIGHTS).unwrap();
        Self { root }
    }

    fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// Serves once, until there are `num_files` files of packed weights; returns an answer and the log.
    fn serve(&self, flags: &[&str], num_files: usize) -> (Value, String) {
        self.serve_until(flags, || self.files().len() == num_files)
    }

    /// Serves once, until `file` is another one.
    fn serve_until_replaced(&self, flags: &[&str], file: &Path) -> (Value, String) {
        let before = inode(file);
        self.serve_until(flags, || inode(file) != before)
    }

    fn serve_until(&self, flags: &[&str], is_done: impl Fn() -> bool) -> (Value, String) {
        let log = self.root.join("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
        command.arg("serve").arg(self.model()).args(flags).stderr(File::create(&log).unwrap());
        command.env("XDG_CACHE_HOME", self.root.join("cache")).env("QUIRE_LOG", "info").env("NO_COLOR", "1");
        let server = Server::spawn(&mut command);
        let body = json!({
            "model": "model", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.9, "seed": 5,
            "ignore_eos": true, "return_token_ids": true, "logprobs": 2
        });
        let (head, body) = server.ask("POST", "/v1/completions", &body);
        assert!(head.starts_with("http/1.1 200"), "{head}\n{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_done() {
            assert!(Instant::now() < deadline, "there is {:?}", self.files());
            std::thread::sleep(Duration::from_millis(5));
        }
        // The line about it comes right after.
        std::thread::sleep(Duration::from_millis(50));
        server.signal("TERM");
        assert_eq!(server.wait(), 0);
        (answer["choices"].clone(), fs::read_to_string(log).unwrap())
    }

    /// Files of packed weights that are complete, wherever they are.
    fn files(&self) -> Vec<PathBuf> {
        let list =
            |folder: PathBuf| folder.read_dir().into_iter().flatten().map(|entry| entry.unwrap().path());
        let all = list(self.model()).chain(list(self.root.join("cache/quire")));
        all.filter(|path| path.extension().is_some_and(|extension| extension == "pack")).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

#[test]
fn the_second_start_uses_the_file_of_the_first() {
    let scene = Scene::new("twice");
    let flags = ["--quantize", "int8", "--prepack", "on"];
    let (first, log) = scene.serve(&flags, 1);
    assert!(log.contains("kept packed weights") && !log.contains("using prepacked"), "{log}");
    let file = scene.files().remove(0);
    assert_eq!(file.parent(), Some(&*scene.model().canonicalize().unwrap()), "beside the model");
    let inode_before = inode(&file);

    let (second, log) = scene.serve(&flags, 1);
    assert!(log.contains("using prepacked weights") && !log.contains("kept packed"), "{log}");
    assert_eq!((&second, inode(&file)), (&first, inode_before));

    // Small and quickly packed: not worth a file, and a file is used all the same. Never, if the user says so.
    let (automatic, log) = scene.serve(&["--quantize", "int8"], 1);
    assert!(automatic == first && log.contains("using prepacked weights"), "{log}");
    let (_, log) = scene.serve(&["--quantize", "int4"], 1);
    assert!(!log.contains("packed"), "{log}");
    let (off, log) = scene.serve(&["--quantize", "int8", "--prepack", "off"], 1);
    assert!(off == first && !log.contains("packed"), "{log}");

    // Damaged, then outdated: ignored with a reason, and replaced.
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let (third, log) = scene.serve_until_replaced(&flags, &file);
    assert!(third == first && log.contains("damaged") && log.contains("kept packed"), "{log}");
    let weights = File::options().write(true).open(scene.model().join("model.safetensors")).unwrap();
    weights.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
    let (fourth, log) = scene.serve_until_replaced(&flags, &file);
    assert!(fourth == first && log.contains("other files") && log.contains("kept packed"), "{log}");
}

#[test]
fn a_model_that_may_not_be_written_beside_has_its_file_in_the_cache_folder() {
    let scene = Scene::new("elsewhere");
    let flags = ["--quantize", "int4", "--prepack", "on"];
    // In the way of the temporary file. Permissions would not do: tests may run as root.
    for role in ["int4", "int4-bf16"] {
        fs::create_dir(scene.model().join(format!(".quire-cpu-{role}.pack.tmp"))).unwrap();
    }
    let (first, log) = scene.serve(&flags, 1);
    assert!(log.contains("kept packed weights"), "{log}");
    let file = scene.files().remove(0);
    assert!(file.starts_with(scene.root.join("cache/quire")), "{file:?}");
    let (second, log) = scene.serve(&flags, 1);
    assert!(second == first && log.contains("using prepacked weights"), "{log}");

    // Nowhere to go is a warning.
    fs::remove_dir_all(scene.root.join("cache")).unwrap();
    fs::write(scene.root.join("cache"), "").unwrap();
    let (third, log) = scene.serve(&flags, 0);
    assert!(third == first && log.contains("WARN") && log.contains("cannot be kept"), "{log}");
}
