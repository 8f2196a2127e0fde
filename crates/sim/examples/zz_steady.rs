use quire_sim::bench_scheduler::Rig;
fn main() {
    let n: u32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let steps: u32 = std::env::args().nth(2).unwrap().parse().unwrap();
    let mut rig = Rig::steady(n, steps);
    for _ in 0..steps {
        rig.schedule();
        rig.answer();
        rig.update();
    }
}
