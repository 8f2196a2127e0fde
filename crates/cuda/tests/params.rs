//! The mirrors of the kernels' argument structs, held against the headers by the compiler.

mod common;

use std::fmt::Write as _;

use common::build::{CppLibrary, compiler, files, repository};
use quire_cuda::params::layouts;

#[test]
fn every_struct_has_the_layout_of_its_header() {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no g++ (nor CXX)");
        return;
    };
    let include = repository().join("kernels/include");
    let mut text = String::from("#include <cstddef>\n");
    for header in files(&include, &["h"]) {
        writeln!(text, "#include {:?}", header.file_name().unwrap()).unwrap();
    }
    let mut offsets = 0;
    for (name, size, fields) in layouts() {
        writeln!(text, "static_assert(sizeof({name}) == {size}, \"size of {name}\");").unwrap();
        for (field, offset) in fields {
            let field = field.trim_start_matches("r#");
            writeln!(text, "static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");")
                .unwrap();
            offsets += 1;
        }
    }
    assert!(offsets > 100);
    let source = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("layouts.cpp");
    std::fs::write(&source, text).unwrap();
    CppLibrary {
        file_name: "liblayouts.so",
        sources: vec![source],
        headers: files(&include, &["h"]),
        flags: vec!["-std=c++17".into(), format!("-I{}", include.display())],
    }
    .build(&compiler);
}
