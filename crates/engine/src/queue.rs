//! How much of the queue a priority may fill, and what happens when it is full.
//!
//! Requests below priority 0 may fill half of it, so that a flood of them leaves room. In a full queue a newcomer takes the
//! place of the newest request of the lowest priority that waits, if its own is higher; that one ends as rejected. The
//! engine thread does so, since it alone knows who waits; until it has, newcomers are held in a few places beyond.

use quire_core::Limits;

/// How a request got its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It was free.
    Free,
    /// Somebody of a lower priority has to go.
    Displaces,
}

/// Waiting continuations up to which requests of this priority are taken.
pub(crate) fn share(limits: &Limits, priority: i8) -> u32 {
    if priority < 0 { limits.max_queued_requests / 2 } else { limits.max_queued_requests }
}

/// Live continuations at most: running, waiting, and those for which others have to go, an eighth of the queue.
pub(crate) fn most(limits: &Limits) -> u32 {
    let queue = limits.max_queued_requests;
    limits.max_num_seqs.saturating_add(queue).saturating_add(queue / 8 + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::time::Duration;

    use quire_core::{
        BlockHasher, ExecError, Executor, ExecutorLimits, FinishReason, LateInputs, ModelRunnerOutput,
        RequestError, SamplingParams, SchedulerOutput, StepId, TenantId,
    };
    use quire_scheduler::SchedulerConfig;

    use super::*;
    use crate::{Engine, EngineClient, EngineConfig, RequestHandle, RequestSpec};

    /// Two milliseconds a step, and always the same token.
    struct Slow(ExecutorLimits, VecDeque<Arc<SchedulerOutput>>);

    impl Executor for Slow {
        fn limits(&self) -> ExecutorLimits {
            self.0.clone()
        }

        fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
            let step = plan.step;
            self.1.push_back(plan);
            Ok(step)
        }

        fn sample(&mut self, _: StepId, _: &LateInputs) -> Result<(), ExecError> {
            Ok(())
        }

        fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
            std::thread::sleep(Duration::from_millis(2));
            let plan = self.1.pop_front().expect("it was submitted");
            out.step = step;
            plan.scheduled.iter().filter(|row| row.sample).for_each(|row| out.push_row(row.slot, &[7], []));
            Ok(())
        }
    }

    /// One place in the batch, four in the queue.
    fn start() -> Engine {
        let limits = ExecutorLimits {
            block_size: 16,
            num_blocks: 4096,
            max_num_seqs: 1,
            max_num_batched_tokens: 64,
            max_model_len: 1 << 15,
            vocab_size: 100,
            max_steps_in_flight: 1,
            kv_groups: vec![None],
        };
        let config = EngineConfig {
            limits: Limits {
                vocab_size: 100,
                max_model_len: limits.max_model_len,
                max_num_seqs: 1,
                max_num_batched_tokens: 64,
                max_queued_requests: 4,
                block_size: 16,
                num_blocks: limits.num_blocks,
                ..Limits::default()
            },
            scheduler: SchedulerConfig::new(limits.clone(), BlockHasher::new((1, 2), 16)),
            hasher: BlockHasher::new((1, 2), 16),
            model_name: "slow".into(),
        };
        let executor = Box::new(Slow(limits, VecDeque::new()));
        Engine::start(config, executor, &tokio::runtime::Handle::current()).expect("a thread")
    }

    fn submit(client: &EngineClient, priority: i8) -> Result<RequestHandle, RequestError> {
        client.submit(RequestSpec {
            prompt: Arc::from([1, 2, 3]),
            params: Arc::new(SamplingParams::greedy(20_000)),
            tenant: TenantId(0),
            priority,
            cache_salt: None,
            adapter: None,
            session: None,
            timeout: None,
        })
    }

    async fn waiting(client: &EngineClient, num: u32) {
        let is_so = async {
            while client.snapshot().num_running != 1 || client.snapshot().num_waiting != num {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), is_so).await.expect("the queue gets as long as that");
    }

    /// Why a request ended, if it did.
    async fn end(handle: &mut RequestHandle) -> Option<FinishReason> {
        loop {
            let delta = tokio::time::timeout(Duration::from_secs(20), handle.next()).await;
            let delta = delta.expect("it ends")?;
            if let Some(finished) = delta.finished {
                return Some(finished.reason);
            }
        }
    }

    #[tokio::test]
    async fn a_flood_of_low_priority_does_not_lock_others_out() {
        let engine = start();
        let client = engine.client();
        let mut held = vec![submit(&client, 0).unwrap()];
        waiting(&client, 0).await;
        let mut batch = Vec::new();
        for num in 1..=2 {
            batch.push(submit(&client, -1).unwrap());
            waiting(&client, num).await;
        }
        assert!(
            matches!(submit(&client, -1), Err(RequestError::Overloaded { limit: 2, .. })),
            "it may fill half of the queue"
        );
        for num in 3..=4 {
            held.push(submit(&client, 0).unwrap());
            waiting(&client, num).await;
        }
        for at in [1, 0] {
            held.push(submit(&client, 0).unwrap());
            assert_eq!(end(&mut batch[at]).await, Some(FinishReason::Rejected), "the newest first");
            waiting(&client, 4).await;
        }
        assert!(
            matches!(submit(&client, 0), Err(RequestError::Overloaded { limit: 4, .. })),
            "nobody is lower"
        );
        drop(held);
        tokio::time::timeout(Duration::from_secs(20), client.idle()).await.expect("no place is lost");
    }
}
