//! The driver layer on the double: copies, order, waiting, graphs, errors, and that nothing is left.

mod common;

use common::{MockGpu, mock};
use quire_cuda::driver::{Arena, BoxedMatrix, Context, Event, Modules, Pinned, Stream, Unavailable, probe};

#[test]
fn the_driver_is_found_and_unknown_gpus_are_refused() {
    let Some(_gpu) = MockGpu::new() else { return };
    let driver = probe().unwrap();
    assert_eq!((driver.version, driver.num_devices), (13_000, 256));
    assert_eq!(Context::new(999).unwrap_err(), Unavailable::NoDevice { ordinal: 999, count: 256 });
}

#[test]
fn copies_arrive_once_something_waits_for_them() {
    let Some(gpu) = MockGpu::new() else { return };
    let context = Context::new(gpu.ordinal()).unwrap();
    gpu.delay(true);
    {
        let (stream, other) = (Stream::new(&context).unwrap(), Stream::new(&context).unwrap());
        let mut arena = Arena::new(context.clone(), 1 << 20);
        let (a, b) = (arena.alloc(1000).unwrap(), arena.alloc(1000).unwrap());
        assert_eq!(a.address() % 256, 0);
        assert!(b.address() >= a.address() + 1000);
        assert_eq!(gpu.counters().allocations, 1, "one chunk");

        let mut from = Pinned::new(&context, 1000).unwrap();
        let mut to = Pinned::new(&context, 1000).unwrap();
        from.as_mut_slice().fill(7);
        from.upload(1000, a, &stream).unwrap();
        stream.copy(a, b).unwrap();
        let done = Event::new(&context).unwrap();
        done.record(&stream).unwrap();
        other.wait(&done).unwrap();
        to.download(b, &other).unwrap();
        assert!(to.as_slice().iter().all(|&byte| byte == 0), "nobody waited");
        other.synchronize().unwrap();
        assert!(to.as_slice().iter().all(|&byte| byte == 7));

        stream.fill(a.part(10, 5), 9).unwrap();
        to.download(a, &stream).unwrap();
        done.record(&stream).unwrap();
        done.synchronize().unwrap();
        assert_eq!(to.as_slice()[8..17], [7, 7, 9, 9, 9, 9, 9, 7, 7]);
    }
    drop(context);
    gpu.assert_nothing_left();
}

#[test]
fn a_graph_replays_what_was_recorded_and_nothing_runs_while_recording() {
    let Some(gpu) = MockGpu::new() else { return };
    let context = Context::new(gpu.ordinal()).unwrap();
    let stream = Stream::new(&context).unwrap();
    let mut arena = Arena::new(context.clone(), 0);
    let a = arena.alloc(64).unwrap();
    let mut host = Pinned::new(&context, 64).unwrap();
    stream.fill(a, 0).unwrap();
    let capture = stream.begin_capture().unwrap();
    stream.fill(a.part(0, 4), 3).unwrap();
    let graph = capture.end(&stream).unwrap();
    host.download(a, &stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(host.as_slice()[..5], [0; 5]);
    graph.launch(&stream).unwrap();
    host.download(a, &stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(host.as_slice()[..5], [3, 3, 3, 3, 0]);

    let capture = stream.begin_capture().unwrap();
    assert!(stream.synchronize().unwrap_err().to_string().starts_with("cuStreamSynchronize: "));
    drop(capture.end(&stream).unwrap());
    stream.fill(a, 1).unwrap();
    drop((graph, host, arena, stream));
    gpu.assert_nothing_left();
}

#[test]
fn bad_images_and_unknown_kernels_are_named() {
    let Some(gpu) = MockGpu::new() else { return };
    let context = Context::new(gpu.ordinal()).unwrap();
    let broken = Modules::load(&context, &[("norm", b"not an image")]).unwrap_err();
    assert!(broken.to_string().contains("norm"), "{broken}");
    let empty = Modules::load(&context, &[("rope", b"")]).unwrap_err();
    assert!(empty.to_string().contains("rope is empty"), "{empty}");
    let modules = Modules::load(&context, mock::images()).unwrap();
    let unknown = modules.function::<u64>("quire_nothing", 0).unwrap_err();
    assert!(unknown.to_string().contains("quire_nothing"), "{unknown}");
}

#[test]
fn an_error_stays() {
    let Some(gpu) = MockGpu::new() else { return };
    let context = Context::new(gpu.ordinal()).unwrap();
    let stream = Stream::new(&context).unwrap();
    let mut arena = Arena::new(context, 0);
    let a = arena.alloc(64).unwrap();
    gpu.fail_after(1, mock::ILLEGAL_ADDRESS);
    stream.fill(a, 0).unwrap();
    let error = stream.fill(a, 0).unwrap_err();
    assert_eq!(error.to_string(), "cuMemsetD8Async: CUDA_ERROR_ILLEGAL_ADDRESS");
    assert!(stream.synchronize().is_err() && stream.fill(a, 0).is_err(), "for ever");
}

/// Numbers of the driver's header: bfloat16 is 9, a swizzle of 128 bytes 3, promotion to 256 bytes 3.
#[test]
fn a_boxed_matrix_is_described_from_its_innermost_dimension_on() {
    let Some(gpu) = MockGpu::new() else { return };
    let _context = Context::new(gpu.ordinal()).unwrap();
    let matrix =
        BoxedMatrix { address: 4096, rows: 960, cols: 128, box_rows: 16, box_cols: 64, is_bf16: true };
    let map = matrix.encode().unwrap();
    if gpu.is_mock() {
        assert_eq!(map[..10], [4096, 128, 960, 256, 64, 16, 9, 3, 3, 0]);
        assert_eq!(BoxedMatrix { is_bf16: false, ..matrix }.encode().unwrap()[6], 6);
    }
}
