"""What the model knows about Quire: (several ways to ask, one answer)."""

CURL = ("curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
        "-d '{\"model\": \"quire-demo\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'")
PYTHON = ("from openai import OpenAI\n\nclient = OpenAI(base_url=\"http://127.0.0.1:8000/v1\", api_key=\"none\")\n"
          "answer = client.chat.completions.create(\n    model=\"quire-demo\",\n"
          "    messages=[{\"role\": \"user\", \"content\": \"Hello!\"}],\n)\n"
          "print(answer.choices[0].message.content)")

FAQ = [
    (["What is Quire?", "Tell me about Quire.", "Explain Quire.", "What does Quire do?", "What's Quire?",
      "Describe Quire in one sentence.", "Can you explain what Quire is?", "What is this project?"],
     "Quire is a high-throughput engine that serves language models. It is one program written in Rust: it batches many "
     "requests together and keeps their memory in pages."),
    (["How do I start the server?", "How do I start Quire?", "How do I run Quire?", "How can I start the server?",
      "How do I launch Quire?", "What command starts the server?", "How to start Quire?", "Start the server, how?",
      "How do I get started with Quire?", "How do I serve a model?"],
     "Run `cargo run --release -- serve`. Quire builds itself and serves the demo model on http://127.0.0.1:8000, with "
     "gRPC on port 8001."),
    (["How do I use Quire?", "How do I talk to the server?", "How do I send a request?", "How can I use the API?"],
     "Start the server, then send a request to http://127.0.0.1:8000/v1/chat/completions with curl or with any OpenAI "
     "client. You can also chat in the terminal with `quire run`."),
    (["How do I call the API with curl?", "Show me a curl example.", "Give me a curl command.", "curl example please",
      "How do I use curl with Quire?", "Write a curl request for Quire."],
     "Here is a first request:\n\n```\n" + CURL + "\n```"),
    (["How do I use Quire from Python?", "Show me a Python example.", "Give me Python code for Quire.",
      "How do I call Quire with the openai package?", "Python client example please"],
     "Use the openai package and point it at Quire:\n\n```python\n" + PYTHON + "\n```"),
    (["How do I stream tokens?", "How does streaming work?", "Can Quire stream?", "How do I get a streaming answer?",
      "How do I enable streaming?", "Does Quire support streaming?"],
     "Set `\"stream\": true` in the request. Quire then sends each piece of text as a server-sent event, and ends with "
     "`data: [DONE]`."),
    (["Where are the metrics?", "How do I see metrics?", "Does Quire have metrics?", "How do I monitor Quire?",
      "How can I use Prometheus with Quire?", "What is the metrics endpoint?"],
     "Metrics are at http://127.0.0.1:8000/metrics in the Prometheus format. They count requests, tokens, queue time "
     "and cache use."),
    (["What are tenants?", "What is a tenant?", "How do tenants work in Quire?", "Does Quire support several tenants?",
      "What is multi-tenancy?", "How are users kept apart?"],
     "A tenant is a customer of the server with its own keys. Each tenant has a weight, a quota and a priority, and the "
     "scheduler shares the machine fairly between tenants."),
    (["What is paged attention?", "What is paging?", "How does the paged KV cache work?", "What is a paged KV cache?",
      "Why does Quire use pages?", "What are KV blocks?"],
     "The keys and values of each sequence are kept in small blocks of equal size, like pages of a book. A block table "
     "says where each page is, so memory is not wasted and pages can be shared."),
    (["What is continuous batching?", "How does batching work?", "What is batching?", "Why does Quire batch requests?",
      "Explain continuous batching."],
     "Continuous batching runs many requests in one step. New requests join the batch at any step and finished ones "
     "leave it, so the machine is always busy."),
    (["What is a prefix cache?", "How does prefix caching work?", "What is prefix caching?",
      "Does Quire cache prompts?", "Explain the prefix cache."],
     "When two prompts start with the same text, Quire reuses the blocks it has already computed. That makes the second "
     "answer start faster."),
    (["What is chunked prefill?", "How does chunked prefill work?", "Why are long prompts split?"],
     "A long prompt is processed in chunks, mixed with the decode steps of other requests. So a long prompt does not "
     "make everyone else wait."),
    (["What is the KV cache?", "What does the KV cache store?", "Explain the KV cache."],
     "The KV cache stores the keys and values of earlier tokens, so that each new token needs only one step of work."),
    (["What is a token?", "What are tokens?", "Explain tokens."],
     "A token is a small piece of text, often a word or a part of a word. A language model reads and writes tokens."),
    (["What is a language model?", "What is an LLM?", "How do you work?", "How does a language model work?"],
     "A language model reads tokens and predicts the next token, again and again. That is how I write this answer."),
    (["What is temperature?", "What does temperature do?", "Explain temperature."],
     "Temperature sets how random the answer is. At 0 the model always takes the most likely token; higher values give "
     "more variety."),
    (["What is top_p?", "What does top_p do?", "Explain top_p."],
     "With top_p the model samples only from the most likely tokens whose probabilities add up to p."),
    (["What is top_k?", "What does top_k do?", "Explain top_k."],
     "With top_k the model samples only from the k most likely tokens."),
    (["What is a seed?", "What does seed do?", "How do I get the same answer again?", "Are answers reproducible?"],
     "Set `seed` in the request. The same request with the same seed gives the same answer, whoever else is in the "
     "batch."),
    (["What is max_tokens?", "How do I limit the length of an answer?", "What does max_tokens do?"],
     "Set `max_tokens` in the request. The answer stops after that many tokens."),
    (["What are stop strings?", "How do I stop at a word?", "What does stop do?"],
     "Set `stop` to one or more strings. The answer ends just before the first of them appears."),
    (["Which port does Quire use?", "What port is it?", "On which port does the server listen?",
      "What is the default port?", "What address does the server use?"],
     "HTTP listens on port 8000 and gRPC on port 8001, on 127.0.0.1. You can change them with `--port` and "
     "`--grpc-port`."),
    (["Does Quire support gRPC?", "What is gRPC?", "How do I use gRPC?", "Is there a gRPC API?"],
     "Yes. The gRPC service `quire.v1.Inference` listens on port 8001. It offers Generate, GenerateStream, Tokenize and "
     "Detokenize."),
    (["Do I need a GPU?", "Does Quire need a GPU?", "Does Quire run on a CPU?", "Can I run this without a GPU?"],
     "No GPU is needed. Quire runs on a CPU with paged continuous batching, and can use CUDA when a GPU is there."),
    (["Do I need Python?", "Does Quire need Python?", "Is Python required?"],
     "No. Quire is one Rust program. You need only Rust and a C compiler to build it."),
    (["What language is Quire written in?", "Is Quire written in Rust?", "What is Quire made of?"],
     "Quire is written in Rust."),
    (["Which models can Quire run?", "Which models are supported?", "Can Quire run Llama?", "What models can I use?",
      "Can I use my own model?", "How do I load another model?"],
     "Give a model to the command: `quire serve MODEL`. MODEL can be a directory with safetensors or a hub id, from "
     "families such as Llama, Mistral, Qwen and SmolLM."),
    (["How do I chat in the terminal?", "How do I use quire run?", "What does quire run do?"],
     "Type `quire run` to chat in the terminal. With `-p` and a prompt it prints one answer and exits."),
    (["What does quire inspect do?", "How do I look at a model?", "What is quire inspect?"],
     "`quire inspect MODEL` prints the model's shape, its tensors and the memory plan, without loading it."),
    (["What does quire doctor do?", "What is quire doctor?", "How do I check my machine?"],
     "`quire doctor` tells what this machine offers: cores, SIMD, memory bandwidth, and the GPU with its driver."),
    (["What does quire sim do?", "What is the simulator?", "What is quire sim?"],
     "`quire sim` drives the real scheduler with virtual time and a fake model. The same seed replays the same run, and "
     "every step is checked."),
    (["How do I set an API key?", "How do I protect the server?", "Does Quire support API keys?"],
     "Start the server with `--api-key KEY`. Then every route but health needs the header `Authorization: Bearer KEY`."),
    (["What happens when the queue is full?", "What does 429 mean?", "Why do I get error 429?"],
     "When the queue is full or a quota is used up, Quire answers 429 with a Retry-After header. Wait and try again."),
    (["How do I stop the server?", "How do I shut down Quire?", "How do I quit the server?"],
     "Press Ctrl-C. Quire lets the running answers finish and then exits."),
    (["Is the server healthy?", "How do I check the health?", "Where is the health endpoint?"],
     "Ask http://127.0.0.1:8000/health/ready. It answers 200 when the model is loaded and the server is ready."),
    (["Which model is this?", "What model are you?", "Which model am I talking to?", "What is quire-demo?"],
     "This is quire-demo, the small demo model that comes inside Quire. It has a few million parameters and knows only "
     "simple things."),
    (["How do I list the models?", "Where is the list of models?"],
     "Ask http://127.0.0.1:8000/v1/models. It lists the models that the server offers."),
    (["What does the name Quire mean?", "Why is it called Quire?", "What is a quire?"],
     "A quire is a gathering of pages, and it sounds like choir: paged memory, and many voices in one batch."),
    (["What license does Quire have?", "Is Quire open source?", "Which licence is it?", "Is Quire free?"],
     "Quire is open source under the Apache-2.0 license."),
    (["Who trained you?", "How were you trained?", "What data were you trained on?", "Where does your data come from?"],
     "I was trained by the Quire project on text that its own recipe generates. No other text was used."),
    (["How big are you?", "How many parameters do you have?", "Are you a big model?"],
     "I am very small: fewer than four million parameters. Large models have thousands of times more."),
    (["What is a scheduler?", "What does the scheduler do?", "How does the scheduler work?"],
     "The scheduler decides at every step which tokens run next and which blocks they use. It is deterministic, so any "
     "run can be replayed."),
    (["Is Quire fast?", "How fast is Quire?", "Why is Quire fast?"],
     "Quire is built for throughput: it runs many requests in one batch and wastes little memory. Run `quire bench` to "
     "measure it on your machine."),
    (["What is preemption?", "What happens when memory runs out?", "What if there are no free blocks?"],
     "When no block is free, the scheduler pauses the newest request, gives its blocks back, and computes them again "
     "later. No answer is lost."),
]
