#include "report/html_page.h"

#include <fmt/core.h>

namespace sluice::report {
namespace {

constexpr const char* kStyle = R"(
:root{--ink:#1b2430;--soft:#5c6b7c;--line:#dde3ea;--paper:#fff;--wash:#f5f7fa;--good:#12805c;
--bad:#c0262d}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1140px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:27px;margin:0 0 4px}h1.part{margin-top:40px}h2{font-size:19px;margin:0 0 4px}h3{font-size:14px;margin:14px 0 4px}
p{margin:4px 0 10px;color:var(--soft);max-width:85ch}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:18px 22px;
margin-top:18px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px;margin:8px 0}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
th[colspan]{text-align:center}.tight th,.tight td{padding:5px 6px}
th.text,td.text{text-align:left}td.text{white-space:normal}
.verdicts{display:flex;flex-wrap:wrap;gap:12px;margin-top:16px}
.verdict{background:var(--paper);border:1px solid var(--line);border-left:5px solid var(--soft);
border-radius:8px;padding:9px 15px;flex:1 1 300px}
.verdict b{display:block}.verdict.pass{border-left-color:var(--good)}
.verdict.fail{border-left-color:var(--bad)}.verdict.pass b{color:var(--good)}
.verdict.fail b{color:var(--bad)}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.w1{background:#fff6e0}.w2{background:#ffe3c7}.w3{background:#ffcfcc}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin:6px 0}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:4px 22px}
svg{width:100%;height:auto;display:block}
svg .grid{stroke:#e6ebf0}svg .axis{stroke:#9aa7b5}svg .danger{fill:#fdeaea}
svg text{fill:#5c6b7c;font:11.5px system-ui,sans-serif}svg .label{fill:#1b2430}
polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}
details{margin-top:6px}summary{cursor:pointer;font-weight:600;padding:3px 0}
)";

}  // namespace

std::string html_page(const std::string& title, const std::string& heading, const std::string& body,
                      const std::string& version) {
  return fmt::format(
      "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
      "<meta name='viewport' content='width=device-width,initial-scale=1'>"
      "<title>{}</title><style>{}</style></head><body><main>"
      "<h1>{}</h1>{}<p>Sluice {}</p></main></body></html>\n",
      title, kStyle, heading, body, version);
}

}  // namespace sluice::report
